// Times the forward and the backward kernel of token_logps in bfloat16, threads times unroll.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=native -I csrc
//     bench/cuda/sweep_token_logps.cu -o sweep
//   ./sweep [ROWS VOCABULARY [VALID_PERCENT [ROUNDS]]]
//
// One JSON object a line: first the device-to-device copy that is timed in the same rounds, then
// each variant with its median time, and GB/s of the fewest bytes that have to move. The forward
// reads N_valid * V * 2 of them; the backward reads as many, and writes N * V * 2.
//
// Before anything is timed, a few rows of the first variant are held against float64 on the host,
// and all rows of the others against the first. A variant that differs or cannot be launched is
// reported and not timed. Exit status: 0 if none differs.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/token_logps_backward.cuh"
#include "cuda/token_logps_forward.cuh"

namespace {

using simpo_ext::BFloat16;
using simpo_ext::TokenLogpsArgs;
using simpo_ext::TokenLogpsBackwardArgs;

constexpr int64_t kIgnoreIndex = -100;
constexpr int kCheckedRows = 4;
constexpr int kWarmupRounds = 2;
// Between two variants that are right: their sums are in different orders, and a difference of one
// float32 rounding can be one of a bfloat16 rounding in the gradient.
constexpr float kLogpTolerance = 1e-5f;
constexpr float kGradientTolerance = 0x1p-7f;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

template <typename T>
T* allocate(int64_t count, const char* what) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, static_cast<size_t>(count) * sizeof(T)), what);
  return static_cast<T*>(pointer);
}

// ---- inputs ---------------------------------------------------------------------------------

// splitmix64: a well-mixed function of an index, the same on host and device.
__host__ __device__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

__host__ __device__ float uniform(uint64_t x) {
  return static_cast<float>(mix(x) >> 40) * 0x1p-24f;
}

__global__ void fill_logits(BFloat16* logits, int64_t count, int64_t V, const int64_t* labels) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    // The sum of a few uniform numbers, about normal with standard deviation 2; the label's logit
    // is among the large ones.
    float x = 0.0f;
    for (uint64_t k = 0; k < 4; ++k) x += uniform(4 * static_cast<uint64_t>(i) + k);
    x = (x - 2.0f) * 3.46f;
    if (labels[i / V] == i % V) x += 10.0f;
    logits[i] = simpo_ext::narrow<BFloat16>(x);
  }
}

// ---- comparison -----------------------------------------------------------------------------

__device__ bool differs(float a, float b, float relative, float absolute) {
  // Written so that a NaN differs from everything.
  return !(fabsf(a - b) <= absolute + relative * fmaxf(fabsf(a), fabsf(b)));
}

__global__ void count_different_logps(const float* a, const float* b, int64_t count,
                                      unsigned long long* found) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count && differs(a[i], b[i], kLogpTolerance, kLogpTolerance)) atomicAdd(found, 1ull);
}

__global__ void count_different_gradients(const BFloat16* a, const BFloat16* b, int64_t count,
                                          unsigned long long* found) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    if (differs(simpo_ext::widen(a[i]), simpo_ext::widen(b[i]), kGradientTolerance, 1e-30f)) {
      atomicAdd(found, 1ull);
    }
  }
}

// ---- variants -------------------------------------------------------------------------------

struct Variant {
  int threads;
  int unroll;
  int (*forward)(const TokenLogpsArgs&, simpo_ext::cuda::Stream);
  int (*backward)(const TokenLogpsBackwardArgs&, simpo_ext::cuda::Stream);
};

template <int kThreads, int kUnroll>
Variant variant() {
  using Logits = simpo_ext::ScaledLogits<float>;
  return {kThreads, kUnroll,
          &simpo_ext::cuda::launch_token_logps<BFloat16, Logits, kThreads, kUnroll, false>,
          &simpo_ext::cuda::launch_token_logps_backward<BFloat16, Logits, kThreads, kUnroll>};
}

std::vector<Variant> all_variants() {
  return {variant<128, 2>(), variant<128, 4>(),  variant<128, 8>(),  variant<256, 2>(),
          variant<256, 4>(), variant<256, 8>(),  variant<512, 2>(),  variant<512, 4>(),
          variant<512, 8>(), variant<1024, 2>(), variant<1024, 4>(), variant<1024, 8>()};
}

struct Status {
  std::string error;  // empty: right
  std::vector<float> milliseconds;

  bool is_right() const { return error.empty(); }
};

double median(std::vector<float> samples) {
  std::sort(samples.begin(), samples.end());
  const size_t middle = samples.size() / 2;
  return samples.size() % 2 ? samples[middle] : 0.5 * (samples[middle - 1] + samples[middle]);
}

// ---- the sweep ------------------------------------------------------------------------------

class Sweep {
 public:
  Sweep(int64_t rows, int64_t vocabulary, int64_t valid_percent)
      : N_(rows), V_(vocabulary), labels_(rows), grads_(rows) {
    for (int64_t row = 0; row < N_; ++row) {
      const uint64_t random = mix(0x1000000000000u + static_cast<uint64_t>(row));
      // Spread evenly: as many more as the share of all rows so far grows by.
      const bool is_valid = row * valid_percent / 100 != (row + 1) * valid_percent / 100;
      labels_[row] =
          is_valid ? static_cast<int64_t>(random % static_cast<uint64_t>(V_)) : kIgnoreIndex;
      num_valid_ += is_valid;
      grads_[row] = uniform(0x2000000000000u + static_cast<uint64_t>(row)) + 0.5f;
    }
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    d_labels_ = allocate<int64_t>(N_, "labels");
    d_grads_ = allocate<float>(N_, "gradients of the log-probabilities");
    logps_ = allocate<float>(N_, "logps");
    first_logps_ = allocate<float>(N_, "logps");
    max_ = allocate<float>(N_, "max");
    sum_exp_ = allocate<double>(N_, "sum_exp");
    found_ = allocate<unsigned long long>(1, "counter");
    logits_ = allocate<BFloat16>(N_ * V_, "logits");
    gradient_ = allocate<BFloat16>(N_ * V_, "gradient");
    first_gradient_ = allocate<BFloat16>(N_ * V_, "gradient");
    check(cudaMemcpy(d_labels_, labels_.data(), N_ * sizeof(int64_t), cudaMemcpyHostToDevice),
          "labels");
    check(cudaMemcpy(d_grads_, grads_.data(), N_ * sizeof(float), cudaMemcpyHostToDevice),
          "gradients of the log-probabilities");
    fill_logits<<<4096, 256, 0, stream_>>>(logits_, N_ * V_, V_, d_labels_);
    check(cudaGetLastError(), "fill_logits");
    check(cudaStreamSynchronize(stream_), "fill_logits");
  }

  int run(int rounds) {
    const std::vector<Variant> variants = all_variants();
    std::vector<Status> forward(variants.size()), backward(variants.size());
    verify(variants, forward, backward);
    time(variants, forward, backward, rounds);

    const double row_bytes = static_cast<double>(V_) * sizeof(BFloat16);
    const double copy_gb_per_s = 2.0 * row_bytes * static_cast<double>(N_) / median(copy_) / 1e6;
    std::printf(
        "{\"kernel\": \"copy\", \"rows\": %lld, \"vocabulary\": %lld, \"valid_rows\": %lld, "
        "\"ms\": %.6f, \"gb_per_s\": %.3f}\n",
        static_cast<long long>(N_), static_cast<long long>(V_), static_cast<long long>(num_valid_),
        median(copy_), copy_gb_per_s);
    bool all_right = true;
    for (size_t i = 0; i < variants.size(); ++i) {
      const double read = row_bytes * static_cast<double>(num_valid_);
      const double written = row_bytes * static_cast<double>(N_);
      all_right &= print("forward", variants[i], forward[i], read, copy_gb_per_s);
      all_right &= print("backward", variants[i], backward[i], read + written, copy_gb_per_s);
    }
    return all_right ? 0 : 1;
  }

 private:
  TokenLogpsArgs forward_args() const {
    return {simpo_ext::DType::kBFloat16,
            V_,
            logits_,
            {N_ * V_, V_},
            targets(),
            {1.0, 0.0},
            logps_,
            max_,
            sum_exp_};
  }

  TokenLogpsBackwardArgs backward_args() const {
    return {simpo_ext::DType::kBFloat16,
            V_,
            logits_,
            {N_ * V_, V_},
            targets(),
            {1.0, 0.0},
            d_grads_,
            {N_, 1},
            max_,
            sum_exp_,
            gradient_,
            {N_ * V_, V_}};
  }

  // One sequence of N positions, labels at the position of their logits.
  simpo_ext::Targets targets() const { return {d_labels_, {N_, 1}, 1, N_, kIgnoreIndex, false}; }

  // Runs each variant once on outputs full of NaN, so that what it leaves unwritten is found.
  void verify(const std::vector<Variant>& variants, std::vector<Status>& forward,
              std::vector<Status>& backward) {
    bool has_first = false;
    for (size_t i = 0; i < variants.size(); ++i) {
      check(cudaMemsetAsync(logps_, 0xff, N_ * sizeof(float), stream_), "cudaMemset");
      check(cudaMemsetAsync(max_, 0xff, N_ * sizeof(float), stream_), "cudaMemset");
      check(cudaMemsetAsync(sum_exp_, 0xff, N_ * sizeof(double), stream_), "cudaMemset");
      check(cudaMemsetAsync(gradient_, 0xff, N_ * V_ * sizeof(BFloat16), stream_), "cudaMemset");
      forward[i].error = launch_error(variants[i].forward(forward_args(), stream_));
      backward[i].error = forward[i].is_right()
                              ? launch_error(variants[i].backward(backward_args(), stream_))
                              : "no forward";
      check(cudaStreamSynchronize(stream_), "token_logps");
      if (!forward[i].is_right() || !backward[i].is_right()) continue;
      if (!has_first) {
        compare_with_float64(forward[i], backward[i]);
        has_first = forward[i].is_right() && backward[i].is_right();
        std::swap(first_logps_, logps_);
        std::swap(first_gradient_, gradient_);
      } else {
        compare_with_first(forward[i], backward[i]);
      }
    }
  }

  static std::string launch_error(int error) {
    return error == 0 ? "" : cudaGetErrorName(static_cast<cudaError_t>(error));
  }

  void compare_with_first(Status& forward, Status& backward) {
    const int threads = 256;
    const auto blocks = static_cast<unsigned>((N_ + threads - 1) / threads);
    check(cudaMemsetAsync(found_, 0, sizeof(*found_), stream_), "cudaMemset");
    count_different_logps<<<blocks, threads, 0, stream_>>>(first_logps_, logps_, N_, found_);
    if (read_found() != 0) forward.error = "wrong";
    check(cudaMemsetAsync(found_, 0, sizeof(*found_), stream_), "cudaMemset");
    count_different_gradients<<<4096, threads, 0, stream_>>>(first_gradient_, gradient_, N_ * V_,
                                                             found_);
    if (read_found() != 0) backward.error = "wrong";
  }

  unsigned long long read_found() {
    unsigned long long found = 0;
    check(cudaGetLastError(), "comparison");
    check(cudaMemcpyAsync(&found, found_, sizeof(found), cudaMemcpyDeviceToHost, stream_),
          "comparison");
    check(cudaStreamSynchronize(stream_), "comparison");
    return found;
  }

  void compare_with_float64(Status& forward, Status& backward) {
    std::vector<float> logps(N_);
    check(cudaMemcpy(logps.data(), logps_, N_ * sizeof(float), cudaMemcpyDeviceToHost), "logps");
    std::vector<BFloat16> x(V_), dx(V_);
    for (int k = 0; k < kCheckedRows; ++k) {
      const int64_t row = k * (N_ - 1) / std::max(1, kCheckedRows - 1);
      const size_t row_bytes = V_ * sizeof(BFloat16);
      check(cudaMemcpy(x.data(), logits_ + row * V_, row_bytes, cudaMemcpyDeviceToHost), "logits");
      check(cudaMemcpy(dx.data(), gradient_ + row * V_, row_bytes, cudaMemcpyDeviceToHost),
            "gradient");
      const bool is_valid = labels_[row] != kIgnoreIndex;
      double sum = 0.0;
      for (const BFloat16 element : x) sum += std::exp(static_cast<double>(widen(element)));
      const double logsumexp = std::log(sum);
      const double logp = is_valid ? widen(x[labels_[row]]) - logsumexp : 0.0;
      if (!(std::fabs(logps[row] - logp) <= kLogpTolerance * (1.0 + std::fabs(logp)))) {
        forward.error = "wrong";
      }
      for (int64_t i = 0; i < V_; ++i) {
        const double softmax = std::exp(widen(x[i]) - logsumexp);
        const double expected =
            is_valid ? grads_[row] * ((i == labels_[row] ? 1.0 : 0.0) - softmax) : 0.0;
        const double error = std::fabs(widen(dx[i]) - expected);
        if (!(error <= kGradientTolerance * std::fabs(expected))) backward.error = "wrong";
      }
    }
  }

  // The copy and all variants take turns. Everything of a round is enqueued at once, so that
  // launches stay out of the times. The buffers are larger than the L2 cache; of the dirty lines
  // that a backward leaves there to be written later, each backward finds as many, and no forward
  // any.
  void time(const std::vector<Variant>& variants, std::vector<Status>& forward,
            std::vector<Status>& backward, int rounds) {
    std::vector<cudaEvent_t> events(2 * variants.size() + 4);
    for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
    for (int round = 0; round < kWarmupRounds + rounds; ++round) {
      size_t e = 0;
      const auto record = [&] { check(cudaEventRecord(events[e++], stream_), "cudaEventRecord"); };
      record();
      check(cudaMemcpyAsync(gradient_, logits_, N_ * V_ * sizeof(BFloat16),
                            cudaMemcpyDeviceToDevice, stream_),
            "copy");
      record();
      if (forward[0].is_right()) variants[0].forward(forward_args(), stream_);  // cleans the cache
      record();
      for (size_t i = 0; i < variants.size(); ++i) {
        if (forward[i].is_right()) variants[i].forward(forward_args(), stream_);
        record();
      }
      if (backward[0].is_right()) variants[0].backward(backward_args(), stream_);  // dirties it
      record();
      for (size_t i = 0; i < variants.size(); ++i) {
        if (backward[i].is_right()) variants[i].backward(backward_args(), stream_);
        record();
      }
      check(cudaStreamSynchronize(stream_), "token_logps");
      if (round < kWarmupRounds) continue;
      const auto elapsed = [&](size_t first) {
        float milliseconds = 0.0f;
        check(cudaEventElapsedTime(&milliseconds, events[first], events[first + 1]),
              "cudaEventElapsedTime");
        return milliseconds;
      };
      copy_.push_back(elapsed(0));
      for (size_t i = 0; i < variants.size(); ++i) {
        forward[i].milliseconds.push_back(elapsed(2 + i));
        backward[i].milliseconds.push_back(elapsed(3 + variants.size() + i));
      }
    }
    for (const cudaEvent_t event : events) check(cudaEventDestroy(event), "cudaEventDestroy");
  }

  // Returns false for a variant whose results are wrong.
  static bool print(const char* kernel, const Variant& variant, const Status& status, double bytes,
                    double copy_gb_per_s) {
    std::printf("{\"kernel\": \"%s\", \"threads\": %d, \"unroll\": %d, ", kernel, variant.threads,
                variant.unroll);
    if (status.is_right()) {
      const double ms = median(status.milliseconds);
      const double gb_per_s = bytes / ms / 1e6;
      std::printf(
          "\"ms\": %.6f, \"min_ms\": %.6f, \"gb_per_s\": %.3f, \"percent_of_copy\": %.3f}\n", ms,
          *std::min_element(status.milliseconds.begin(), status.milliseconds.end()), gb_per_s,
          100.0 * gb_per_s / copy_gb_per_s);
    } else {
      std::printf("\"error\": \"%s\"}\n", status.error.c_str());
    }
    return status.error != "wrong";
  }

  int64_t N_, V_;
  int64_t num_valid_ = 0;
  std::vector<int64_t> labels_;
  std::vector<float> grads_;
  std::vector<float> copy_;
  cudaStream_t stream_ = nullptr;
  // Device memory, which lives as long as the process.
  int64_t* d_labels_;
  float *d_grads_, *logps_, *first_logps_, *max_;
  double* sum_exp_;
  unsigned long long* found_;
  BFloat16 *logits_, *gradient_, *first_gradient_;
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t rows = argc > 1 ? std::atoll(argv[1]) : 16384;
  const int64_t vocabulary = argc > 2 ? std::atoll(argv[2]) : 128256;
  const int64_t valid_percent = argc > 3 ? std::atoll(argv[3]) : 100;
  const int rounds = argc > 4 ? std::atoi(argv[4]) : 20;
  if (rows < 1 || vocabulary < 1 || valid_percent < 1 || valid_percent > 100 || rounds < 1) {
    std::fprintf(stderr,
                 "usage: %s [ROWS VOCABULARY [VALID_PERCENT [ROUNDS]]]: expected numbers above 0, "
                 "and at most 100 per cent\n",
                 argv[0]);
    return 2;
  }
  return Sweep(rows, vocabulary, valid_percent).run(rounds);
}
