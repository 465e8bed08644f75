// The speed limits of this machine: bandwidths of memory, and the rate of exp-and-sum.
//
// Memory contract: every function touches each byte of its buffer once a call (exp_seconds: an
// L1-resident buffer many times), on `threads` threads that share it in contiguous parts, and
// returns the seconds from the moment all threads stood ready until the last was done. Buffers are
// page-aligned, and their size is a multiple of threads * 4096.
//
// Compiled where it runs, for the processor it finds: -O3 -march=native -ffp-contract=fast
// -fschedule-insns.

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

// 2^x by a rounding constant, a polynomial in the fraction, and the exponent's bits.
struct ShiftedExponent {
  static Floats exp2(Floats x) {
    const float rounding = 12582912.0f + 127.0f;
    const Floats least = Floats{} - 126.0f;
#if defined(__AVX512F__)
    x = reinterpret_cast<Floats>(
        _mm512_max_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(least)));
#elif defined(__AVX__)
    x = reinterpret_cast<Floats>(
        _mm256_max_ps(reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(least)));
#else
    x = x > least ? x : least;
#endif
    const Floats shifted = x + rounding;
    const Floats f = x - (shifted - rounding);
    Floats p = 0.0013264727f * f + 0.0096715130f;
    p = p * f + 0.0555073359f;
    p = p * f + 0.2402224243f;
    p = p * f + 0.6931470037f;
    p = p * f + 1.0f;
    return p * reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted) << 23);
  }
};

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// 2^x by the instructions for the fraction and for the scaling with a power of two.
struct ScaledByInstruction {
  static Floats exp2(Floats x) {
    const auto f = reinterpret_cast<Floats>(
        _mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF | 8));
    Floats p = 0.0018671302f * f + 0.0090170298f;
    p = p * f + 0.0557999127f;
    p = p * f + 0.2401644439f;
    p = p * f + 0.6931512952f;
    p = p * f + 1.0f;
    return reinterpret_cast<Floats>(
        _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
  }
};
#endif

// sum(2^(x * log2(e) - reference)) with K sums.
template <class Exp, int K, bool kBfloat16>
float exp_sum(const void* data) {
  Floats sums[K] = {};
  for (int64_t i = 0; i < kExpElements; i += int64_t{K} * kLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      Floats x;
      if constexpr (kBfloat16) {
        // The order of a sum is free: even and odd elements come apart by a shift and a mask.
        const Ints pairs =
            reinterpret_cast<const Ints*>(static_cast<const uint16_t*>(data) + i)[k / 2];
        x = reinterpret_cast<Floats>(k % 2 ? pairs & 0xffff0000u : pairs << 16);
      } else {
        x = reinterpret_cast<const Floats*>(static_cast<const float*>(data) + i)[k];
      }
      sums[k] += Exp::exp2(x * kLog2e - kReference);
    }
  }
  float sum = 0;
  for (const Floats& each : sums) {
    for (int lane = 0; lane < kLanes; ++lane) sum += each[lane];
  }
  return sum;
}

using ExpSum = float (*)(const void*);

struct Variant {
  ExpSum of_dtype[2];  // float32, bfloat16
};

template <class Exp, int K>
constexpr Variant variant() {
  return {{exp_sum<Exp, K, false>, exp_sum<Exp, K, true>}};
}

constexpr Variant kVariants[] = {
    variant<ShiftedExponent, 2>(),
    variant<ShiftedExponent, 4>(),
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    variant<ScaledByInstruction, 2>(),
    variant<ScaledByInstruction, 4>(),
#endif
};

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

int exp_variants() { return sizeof(kVariants) / sizeof(*kVariants); }

int64_t exp_elements() { return kExpElements; }

// The relative error of a variant's sum.
double exp_error(int bfloat16, int variant) {
  const ExpInput input(bfloat16);
  return std::abs(kVariants[variant].of_dtype[bfloat16](input.bytes) / input.expected - 1);
}

// exp_elements() elements, `repeats` times on each thread, each on a copy of its own.
double exp_seconds(int bfloat16, int variant, int64_t repeats, int threads) {
  const ExpInput input(bfloat16);
  const ExpSum run = kVariants[variant].of_dtype[bfloat16];
  return seconds(threads, [&](int) {
    ExpInput mine = input;
    for (int64_t i = 0; i < repeats; ++i) {
      float sum = run(mine.bytes);
      keep(sum);
    }
  });
}

}  // extern "C"
