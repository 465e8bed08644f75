// Offsets beyond 2^31 and 2^32 elements, in mappings whose unused pages take up no memory.
//
// Not run under the sanitizers, whose shadow of such a mapping may be larger than the machine's
// memory.

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

// Zeros.
template <typename T>
class SparseArray {
 public:
  explicit SparseArray(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory_ != MAP_FAILED, "a sparse mapping is possible", 0.0,
            static_cast<double>(bytes_));
  }
  ~SparseArray() { munmap(memory_, bytes_); }
  SparseArray(const SparseArray&) = delete;
  SparseArray& operator=(const SparseArray&) = delete;

  T* data() const { return static_cast<T*>(memory_); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  size_t bytes_;
  void* memory_;
};

template <typename Logit>
void fill_row(Logit* x, int64_t V, int64_t salt) {
  for (int64_t v = 0; v < V; ++v) {
    const double noise = std::sin(static_cast<double>(v * (salt + 3)));
    x[v] = narrow<Logit>(static_cast<Compute<Logit>>(4.0 * noise));
  }
}

// The logits of a training step, with a few positions that are not masked.
void check_contiguous_forward() {
  using Logit = BFloat16;
  constexpr int64_t B = 2, num_positions = 20000, V = 128256;
  describe("forward of bfloat16 logits [%ld, %ld, %ld]", B, num_positions, V);
  const TokenStrides strides{num_positions * V, V};
  const SparseArray<Logit> logits(B * num_positions * V);
  const Buffer<int64_t> labels(B * num_positions);
  const Buffer<float> logps(B * num_positions), max(B * num_positions);
  const Buffer<double> sum_exp(B * num_positions);
  for (int64_t i = 0; i < labels.size(); ++i) labels[i] = kIgnore;
  // The first element; the first rows with offsets above 2^31 and 2^32; the last row.
  constexpr int64_t kPast31 = (int64_t{1} << 31) / V + 1, kPast32 = (int64_t{1} << 32) / V + 1;
  const std::initializer_list<int64_t> scored = {0, kPast31, kPast32, B * num_positions - 1};
  for (const int64_t row : scored) {
    fill_row(logits.data() + row * V, V, row);
    labels[row] = row % V;
  }
  const Targets targets{labels.data(), {num_positions, 1}, B, num_positions, kIgnore, false};
  require_equal(cuda::token_logps({DType::kBFloat16,
                                   V,
                                   logits.data(),
                                   strides,
                                   targets,
                                   {1.0, 0.0},
                                   logps.data(),
                                   max.data(),
                                   sum_exp.data()},
                                  nullptr),
                0, "error of the forward");
  int64_t num_scored = 0;
  for (int64_t row = 0; row < labels.size(); ++row) {
    if (labels[row] == kIgnore) {
      require_equal(logps[row], 0.0, "logp of a masked row");
      continue;
    }
    const RowTruth<Logit> truth(logits.data() + row * V, V, labels[row], {1.0, 0.0});
    require_close(logps[row], truth.logp(), truth.logp_error(), "logp");
    ++num_scored;
  }
  require_equal(static_cast<double>(num_scored), static_cast<double>(scored.size()), "scored rows");
}

// A few rows far apart, in place, with labels and gradients equally far apart.
template <typename Logit>
void check_far_rows() {
  using Scalar = Compute<Logit>;
  constexpr int64_t B = 2, num_positions = 2, V = 1003;
  // If an offset were cut to 32 bits, it would hit another row, or none.
  constexpr TokenStrides kStrides{(int64_t{1} << 32) + 3 * V + 1, (int64_t{1} << 31) + 8 * V};
  constexpr TokenStrides kLabelStrides{(int64_t{1} << 32) + 3, (int64_t{1} << 31) + 1};
  describe("%s rows at strides of %ld and %ld", DTypeOf<Logit>::name, kStrides.b, kStrides.t);
  const SparseArray<Logit> logits(kStrides.offset(1, 1) + V), dlogits(kStrides.offset(1, 1) + V);
  const SparseArray<int64_t> labels(kLabelStrides.offset(1, 1) + 1);
  const SparseArray<Scalar> grad(kLabelStrides.offset(1, 1) + 1);
  const Buffer<Scalar> logps(B * num_positions), max(B * num_positions);
  const Buffer<double> sum_exp(B * num_positions);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < num_positions; ++t) {
      fill_row(logits.data() + kStrides.offset(b, t), V, 2 * b + t);
      labels[kLabelStrides.offset(b, t)] = 100 * b + 10 * t;
      grad[kLabelStrides.offset(b, t)] = Scalar(1 + b - 3 * t);
    }
  }
  const Targets targets{labels.data(), kLabelStrides, B, num_positions, kIgnore, false};
  require_equal(cuda::token_logps({DTypeOf<Logit>::value,
                                   V,
                                   logits.data(),
                                   kStrides,
                                   targets,
                                   {1.0, 0.0},
                                   logps.data(),
                                   max.data(),
                                   sum_exp.data()},
                                  nullptr),
                0, "error of the forward");
  TokenLogpsBackwardArgs backward{DTypeOf<Logit>::value,
                                  V,
                                  logits.data(),
                                  kStrides,
                                  targets,
                                  {1.0, 0.0},
                                  grad.data(),
                                  kLabelStrides,
                                  max.data(),
                                  sum_exp.data(),
                                  dlogits.data(),
                                  kStrides};
  require_equal(cuda::token_logps_backward(backward, nullptr), 0, "error of the backward");
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < num_positions; ++t) {
      const int64_t offset = kStrides.offset(b, t), label = targets.at(b, t);
      const double g = static_cast<double>(grad[kLabelStrides.offset(b, t)]);
      const RowTruth<Logit> truth(logits.data() + offset, V, label, {1.0, 0.0});
      require_close(static_cast<double>(logps[b * num_positions + t]), truth.logp(),
                    truth.logp_error(), "logp");
      for (int64_t v = 0; v < V; ++v) {
        require_close(static_cast<double>(widen(dlogits[offset + v])), truth.gradient(v, g),
                      truth.gradient_error(v, g), "dlogits");
      }
    }
  }
  backward.dlogits = logits.data();
  require_equal(cuda::token_logps_backward(backward, nullptr), 0, "error of the backward in place");
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < num_positions; ++t) {
      const int64_t offset = kStrides.offset(b, t);
      require(std::memcmp(logits.data() + offset, dlogits.data() + offset, V * sizeof(Logit)) == 0,
              "in place gives the same bits");
    }
  }

  if constexpr (std::is_same_v<Logit, Scalar>) {
    // The same strides for token log-probs, for which grad is used.
    const Buffer<Scalar> sums(B);
    const Buffer<int64_t> counts(B);
    require_equal(cuda::sequence_logps({.dtype = DTypeOf<Scalar>::value,
                                        .token_logps = grad.data(),
                                        .token_strides = kLabelStrides,
                                        .targets = targets,
                                        .sequences = {nullptr, B},
                                        .average = false,
                                        .logps = sums.data(),
                                        .counts = counts.data()},
                                       nullptr),
                  0, "error of sequence_logps");
    require_equal(static_cast<double>(sums[0]), 1.0 - 2.0, "sum of the first sequence");
    require_equal(static_cast<double>(sums[1]), 2.0 - 1.0, "sum of the second sequence");
  }
}

// Rows of hidden states, of weights and of logits equally far apart.
template <typename T>
void check_far_hidden_states() {
  using Scalar = Compute<T>;
  constexpr int64_t H = 1003, R = 3, V = 9;
  constexpr int64_t kFar = (int64_t{1} << 31) + 8 * H;
  describe("%s rows of hidden states %ld apart", DTypeOf<T>::name, kFar);
  // Positions of a contiguous [1, T, H] with offsets of 0, and above 2^31 and 2^32 elements.
  constexpr int64_t kPast31 = (int64_t{1} << 31) / H + 1, kPast32 = (int64_t{1} << 32) / H + 1;
  const Buffer<int64_t> positions(R), labels(R);
  const Buffer<Scalar> label_gradients(R);
  for (int64_t i = 0; i < R; ++i) {
    positions[i] = i == 0 ? 0 : i == 1 ? kPast31 : kPast32;
    labels[i] = i;
    label_gradients[i] = Scalar(1 + i);
  }
  const SparseArray<T> hidden((kPast32 + 1) * H), weight((R - 1) * kFar + H);
  const SparseArray<T> dlogits((R - 1) * kFar + V);
  const Buffer<T> gathered(R * H);
  for (int64_t i = 0; i < R; ++i) {
    fill_row(hidden.data() + positions[i] * H, H, i);
    fill_row(weight.data() + i * kFar, H, i + 7);
  }
  require_equal(cuda::gather_rows({DTypeOf<T>::value,
                                   kPast32 + 1,
                                   H,
                                   R,
                                   positions.data(),
                                   hidden.data(),
                                   {0, H},
                                   gathered.data()},
                                  nullptr),
                0, "error of gather_rows");
  for (int64_t i = 0; i < R; ++i) {
    require(
        std::memcmp(gathered.data() + i * H, hidden.data() + positions[i] * H, H * sizeof(T)) == 0,
        "rows gathered");
  }
  require_equal(cuda::hidden_gradient({DTypeOf<T>::value, kPast32 + 1, H, R, V, positions.data(),
                                       labels.data(), label_gradients.data(), weight.data(), kFar,
                                       1, gathered.data(), nullptr, hidden.data()},
                                      nullptr),
                0, "error of hidden_gradient");
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t h = 0; h < H; ++h) {
      const double expected =
          static_cast<double>(widen(gathered[i * H + h])) +
          static_cast<double>(1 + i) * static_cast<double>(widen(weight[i * kFar + h]));
      require_close(static_cast<double>(widen(hidden[positions[i] * H + h])), expected,
                    1.01 * half_ulp<T>(expected) + 40 * kUnit<Scalar>, "dhidden");
    }
  }
  require_equal(cuda::put_label_gradients({DTypeOf<T>::value, R, V, 0, kIgnore, labels.data(),
                                           label_gradients.data(), dlogits.data(), kFar},
                                          nullptr),
                0, "error of put_label_gradients");
  for (int64_t i = 0; i < R; ++i) {
    require_equal(static_cast<double>(widen(dlogits[i * kFar + i])), static_cast<double>(1 + i),
                  "label's gradient");
  }
}

// Two short sequences in a very long row, which is padding otherwise.
template <typename Scalar>
void check_far_sequences() {
  describe("%s, sequences behind 2^32 positions", DTypeOf<Scalar>::name);
  constexpr int64_t kFirst = (int64_t{1} << 32) + 3, S = 2, N = kFirst + 7;
  const SparseArray<int64_t> labels(N);
  const SparseArray<Scalar> token_logps(N), grad(N);
  const Buffer<int64_t> cu_seqlens(S + 1), counts(S);
  const Buffer<Scalar> logps(S);
  cu_seqlens[0] = kFirst;
  cu_seqlens[1] = kFirst + 2;
  cu_seqlens[2] = kFirst + 5;
  for (int64_t t = kFirst; t < kFirst + 5; ++t) {
    token_logps[t] = Scalar(t - kFirst + 1);
    labels[t] = t == kFirst + 3 ? kIgnore : 1;
  }
  const Targets targets{labels.data(), {N, 1}, 1, N, kIgnore, false};
  require_equal(cuda::sequence_logps({.dtype = DTypeOf<Scalar>::value,
                                      .token_logps = token_logps.data(),
                                      .token_strides = {N, 1},
                                      .targets = targets,
                                      .sequences = {cu_seqlens.data(), S},
                                      .average = false,
                                      .logps = logps.data(),
                                      .counts = counts.data()},
                                     nullptr),
                0, "error of sequence_logps");
  require_equal(static_cast<double>(logps[0]), 3.0, "sum of the first sequence");
  require_equal(static_cast<double>(logps[1]), 8.0, "sum of the second sequence");
  require_equal(cuda::sequence_logps_backward({.dtype = DTypeOf<Scalar>::value,
                                               .targets = targets,
                                               .sequences = {cu_seqlens.data(), S},
                                               .average = false,
                                               .grad_logps = logps.data(),
                                               .grad_stride = 1,
                                               .counts = counts.data(),
                                               .grad_token_logps = grad.data()},
                                              nullptr),
                0, "error of sequence_logps_backward");
  const double expected[] = {3.0, 3.0, 8.0, 0.0, 8.0, 0.0};
  for (int64_t i = 0; i < 6; ++i) {
    require_equal(static_cast<double>(grad[kFirst + i]), expected[i], "gradient");
  }
}

// Labels that are far apart in memory.
void check_far_labels() {
  constexpr int64_t N = 4, kStride = (int64_t{1} << 31) + 1;
  describe("sequence_targets of labels %ld apart", kStride);
  const SparseArray<int64_t> labels(N * kStride);
  const Buffer<int64_t> cu_seqlens(3), got(N);
  for (int64_t s = 0; s < 3; ++s) cu_seqlens[s] = 2 * s;
  for (int64_t t = 0; t < N; ++t) labels[t * kStride] = t + 1;
  require_equal(
      cuda::sequence_targets({.labels = {labels.data(), {0, kStride}, 1, N, kIgnore, true},
                              .num_labels = 9,
                              .sequences = {cu_seqlens.data(), 2},
                              .targets = got.data()},
                             nullptr),
      0, "error of sequence_targets");
  const int64_t expected[] = {2, kIgnore, 4, kIgnore};
  for (int64_t t = 0; t < N; ++t) {
    require_equal(static_cast<double>(got[t]), static_cast<double>(expected[t]), "targets");
  }
}

}  // namespace

void check_offsets(bool) {
  check_contiguous_forward();
  check_far_sequences<float>();
  check_far_sequences<double>();
  check_far_labels();
  for_each_dtype([](auto, auto logit) {
    check_far_rows<decltype(logit)>();
    check_far_hidden_states<decltype(logit)>();
  });
}

}  // namespace simpo_ext::kernel_tests
