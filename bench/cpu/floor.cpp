// The speed limits of this machine: bandwidths of memory, and the rate of exp-and-sum.
//
// Memory contract: every function touches each byte of its buffer once a call (exp_seconds: an
// L1-resident buffer many times), on `threads` threads that share it in contiguous parts, and
// returns the seconds from the moment all threads stood ready until the last was done. Buffers are
// page-aligned, and their size is a multiple of threads * 4096.
//
// Compiled where it runs, for the processor it finds: -O3 -march=native -ffp-contract=fast.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Ints __attribute__((vector_size(kVectorBytes)));

// Stops the compiler from removing a value that nothing reads.
template <typename T>
void keep(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

// A store that goes past the caches, where the instruction set has one.
void stream(Floats* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m512>(value));
#elif defined(__AVX__)
  _mm256_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m256>(value));
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m128>(value));
#else
  *to = value;
#endif
}

void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Seconds that body(thread) takes on all threads, the calling one among them, without their start.
template <typename Body>
double seconds(int threads, const Body& body) {
  std::atomic<int> waiting{threads};
  std::vector<double> begins(threads), ends(threads);
  const auto run = [&](int thread) {
    waiting.fetch_sub(1);
    while (waiting.load(std::memory_order_acquire) > 0) {
    }
    begins[thread] = now();
    body(thread);
    ends[thread] = now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  return *std::max_element(ends.begin(), ends.end()) -
         *std::min_element(begins.begin(), begins.end());
}

// A thread's part of a buffer.
struct Part {
  int64_t begin;  // in vectors
  int64_t end;
};

Part part(int64_t bytes, int threads, int thread) {
  const int64_t vectors = bytes / threads / kVectorBytes;
  return {vectors * thread, vectors * (thread + 1)};
}

// ---- exp and sum -----------------------------------------------------------------------------

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kReference = 8 * kLog2e;
constexpr int64_t kExpElements = 6144;  // 24 KiB of float32; a multiple of every unrolling

Floats splat(float value) { return Floats{} + value; }

// 2^t by a rounding constant, a polynomial in the fraction, and the exponent's bits.
struct ShiftedExponent {
  static Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
    return reinterpret_cast<Floats>(
        _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
  }
  template <int K>
  static void add(const Floats (&arguments)[K], Floats (&sums)[K]) {
    const float rounding = 12582912.0f + 127.0f;
    Floats t[K], u[K], p[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) t[k] = maximum(arguments[k], splat(-126.0f));
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) u[k] = t[k] + rounding;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) t[k] = t[k] - (u[k] - rounding);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = 0.0013264727f * t[k] + 0.0096715130f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * t[k] + 0.0555073359f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * t[k] + 0.2402224243f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * t[k] + 0.6931470037f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * t[k] + 1.0f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      sums[k] = p[k] * reinterpret_cast<Floats>(reinterpret_cast<Ints>(u[k]) << 23) + sums[k];
    }
  }
};

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// 2^t by the instructions for the fraction and for the scaling with a power of two.
struct ScaledByInstruction {
  template <int K>
  static void add(const Floats (&arguments)[K], Floats (&sums)[K]) {
    Floats f[K], p[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      f[k] = reinterpret_cast<Floats>(
          _mm512_reduce_ps(reinterpret_cast<__m512>(arguments[k]), _MM_FROUND_TO_NEG_INF | 8));
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = 0.0018671302f * f[k] + 0.0090170298f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * f[k] + 0.0557999127f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * f[k] + 0.2401644439f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * f[k] + 0.6931512952f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p[k] = p[k] * f[k] + 1.0f;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      sums[k] += reinterpret_cast<Floats>(
          _mm512_scalef_ps(reinterpret_cast<__m512>(p[k]), reinterpret_cast<__m512>(arguments[k])));
    }
  }
};
#endif

// sum(2^(x * log2(e) - reference)) with K vectors in lockstep.
template <class Exp, int K, bool kBfloat16>
float exp_sum(const void* data) {
  Floats sums[K] = {};
  for (int64_t i = 0; i < kExpElements; i += int64_t{K} * kLanes) {
    Floats t[K];
    if constexpr (kBfloat16) {
      // The order of a sum is free: even and odd elements come apart by a shift and a mask.
      const auto* x = reinterpret_cast<const Ints*>(static_cast<const uint16_t*>(data) + i);
#pragma GCC unroll 8
      for (int k = 0; k < K; k += 2) {
        t[k] = reinterpret_cast<Floats>(x[k / 2] << 16);
        t[k + 1] = reinterpret_cast<Floats>(x[k / 2] & 0xffff0000u);
      }
    } else {
      const auto* x = reinterpret_cast<const Floats*>(static_cast<const float*>(data) + i);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) t[k] = x[k];
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) t[k] = t[k] * kLog2e - kReference;
    Exp::add(t, sums);
  }
  float sum = 0;
  for (const Floats& each : sums) {
    for (int lane = 0; lane < kLanes; ++lane) sum += each[lane];
  }
  return sum;
}

using ExpSum = float (*)(const void*);

template <class Exp>
void add_variants(std::vector<ExpSum> (&variants)[2]) {
  variants[0].insert(variants[0].end(),
                     {exp_sum<Exp, 1, false>, exp_sum<Exp, 2, false>, exp_sum<Exp, 4, false>,
                      exp_sum<Exp, 6, false>, exp_sum<Exp, 8, false>});
  variants[1].insert(variants[1].end(), {exp_sum<Exp, 2, true>, exp_sum<Exp, 4, true>,
                                         exp_sum<Exp, 6, true>, exp_sum<Exp, 8, true>});
}

const std::vector<ExpSum>& variants_of(int bfloat16) {
  static const auto all = [] {
    struct Table {
      std::vector<ExpSum> of[2];
    } table;
    add_variants<ShiftedExponent>(table.of);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    add_variants<ScaledByInstruction>(table.of);
#endif
    return table;
  }();
  return all.of[bfloat16];
}

// Values between -12 and 12, and what exp_sum has to make of them.
struct ExpInput {
  alignas(64) unsigned char bytes[kExpElements * 4];
  double expected = 0;

  explicit ExpInput(int bfloat16) {
    for (int64_t i = 0; i < kExpElements; ++i) {
      float x = static_cast<float>((i * 2654435761u % 24001) / 1000.0 - 12.0);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (bfloat16) {
        bits &= 0xffff0000u;
        const auto high = static_cast<uint16_t>(bits >> 16);
        std::memcpy(bytes + 2 * i, &high, 2);
      } else {
        std::memcpy(bytes + 4 * i, &bits, 4);
      }
      std::memcpy(&x, &bits, 4);
      expected += std::exp2(double{x} * kLog2e - kReference);
    }
  }
};

}  // namespace

extern "C" {

// Resident memory on pages of 2 MiB if the kernel gives them, else null.
void* map_buffer(int64_t bytes) {
  void* buffer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer == MAP_FAILED) return nullptr;
  madvise(buffer, bytes, MADV_HUGEPAGE);
  std::memset(buffer, 0, bytes);
  return buffer;
}

void unmap_buffer(void* buffer, int64_t bytes) { munmap(buffer, bytes); }

// Sums the buffer; prefetch: how many bytes ahead, 0 for none.
double read_seconds(const void* buffer, int64_t bytes, int threads, int64_t prefetch) {
  return seconds(threads, [&](int thread) {
    const Part mine = part(bytes, threads, thread);
    const auto* x = static_cast<const Floats*>(buffer);
    Floats sums[4] = {};
    for (int64_t i = mine.begin; i < mine.end; i += 4) {
      if (prefetch > 0) {
        const char* ahead = reinterpret_cast<const char*>(x + i) + prefetch;
        for (int line = 0; line < 4 * kVectorBytes; line += 64) __builtin_prefetch(ahead + line);
      }
      for (int k = 0; k < 4; ++k) sums[k] += x[i + k];
    }
    keep(sums);
  });
}

double copy_seconds(void* to, const void* from, int64_t bytes, int threads) {
  return seconds(threads, [&](int thread) {
    const Part mine = part(bytes, threads, thread);
    auto* y = static_cast<Floats*>(to);
    const auto* x = static_cast<const Floats*>(from);
    for (int64_t i = mine.begin; i < mine.end; ++i) stream(y + i, x[i]);
    end_of_stream();
  });
}

double update_seconds(void* buffer, int64_t bytes, int threads) {
  return seconds(threads, [&](int thread) {
    const Part mine = part(bytes, threads, thread);
    auto* x = static_cast<Floats*>(buffer);
    for (int64_t i = mine.begin; i < mine.end; ++i) x[i] = x[i] * 1.0000001f;
  });
}

int exp_variants(int bfloat16) { return static_cast<int>(variants_of(bfloat16).size()); }

int64_t exp_elements() { return kExpElements; }

// The relative error of a variant's sum.
double exp_error(int bfloat16, int variant) {
  const ExpInput input(bfloat16);
  return std::abs(variants_of(bfloat16)[variant](input.bytes) / input.expected - 1);
}

// exp_elements() elements, `repeats` times on each thread, each on a copy of its own.
double exp_seconds(int bfloat16, int variant, int64_t repeats, int threads) {
  const ExpInput input(bfloat16);
  const ExpSum run = variants_of(bfloat16)[variant];
  return seconds(threads, [&](int) {
    ExpInput mine = input;
    for (int64_t i = 0; i < repeats; ++i) {
      float sum = run(mine.bytes);
      keep(sum);
    }
  });
}

}  // extern "C"
