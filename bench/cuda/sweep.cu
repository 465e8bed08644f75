// Variants of the kernels of token_logps in bfloat16, threads times loads in flight.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=native -shared -Xcompiler -fPIC -I csrc
//     bench/cuda/sweep.cu -o sweep.so
//
// bench/gpu/sweep.py calls them with torch's tensors, and bench/gpu/measure.py times them.

#include <cstdint>

#include "cuda/token_logps_backward.cuh"
#include "cuda/token_logps_forward.cuh"

namespace {

using simpo_ext::BFloat16;
using simpo_ext::TokenLogpsArgs;
using simpo_ext::TokenLogpsBackwardArgs;
using simpo_ext::cuda::Stream;

struct Variant {
  int threads;
  int unroll;
  int (*forward)(const TokenLogpsArgs&, Stream);
  int (*backward)(const TokenLogpsBackwardArgs&, Stream);
};

template <int kThreads, int kUnroll>
constexpr Variant variant() {
  using Logits = simpo_ext::ScaledLogits<float>;
  return {
      kThreads, kUnroll,
      &simpo_ext::cuda::launch_token_logps<BFloat16, Logits, kThreads, kUnroll, false, false>,
      &simpo_ext::cuda::launch_token_logps_backward<BFloat16, Logits, kThreads, kUnroll, false>};
}

constexpr Variant kVariants[] = {variant<128, 2>(),  variant<128, 4>(),  variant<128, 8>(),
                                 variant<256, 2>(),  variant<256, 4>(),  variant<256, 8>(),
                                 variant<512, 2>(),  variant<512, 4>(),  variant<512, 8>(),
                                 variant<1024, 2>(), variant<1024, 4>(), variant<1024, 8>()};

// The logits of a position score the label of the next one.
simpo_ext::Targets targets(const int64_t* labels, int64_t B, int64_t T) {
  return {labels, {T, 1}, B, T, -100, true};
}

}  // namespace

// All tensors are contiguous. The functions return 0 or a cudaError_t.
extern "C" {

int num_variants() { return sizeof(kVariants) / sizeof(*kVariants); }
int threads_of(int variant) { return kVariants[variant].threads; }
int unroll_of(int variant) { return kVariants[variant].unroll; }

int token_logps(int variant, int64_t B, int64_t T, int64_t V,
                const void* logits,     // [B, T, V] bfloat16
                const int64_t* labels,  // [B, T]
                float* logps,           // [B, T]
                float* max,             // [B, T]
                double* sum_exp,        // [B, T]
                Stream stream) {
  return kVariants[variant].forward({simpo_ext::DType::kBFloat16,
                                     V,
                                     logits,
                                     {T * V, V},
                                     targets(labels, B, T),
                                     {1.0, 0.0},
                                     logps,
                                     max,
                                     sum_exp},
                                    stream);
}

int token_logps_backward(int variant, int64_t B, int64_t T, int64_t V,
                         const void* logits,       // [B, T, V] bfloat16
                         const int64_t* labels,    // [B, T]
                         const float* grad_logps,  // [B, T]
                         const float* max,         // [B, T]
                         const double* sum_exp,    // [B, T]
                         void* gradient,           // [B, T, V] bfloat16
                         Stream stream) {
  return kVariants[variant].backward({simpo_ext::DType::kBFloat16,
                                      V,
                                      logits,
                                      {T * V, V},
                                      targets(labels, B, T),
                                      {1.0, 0.0},
                                      grad_logps,
                                      {T, 1},
                                      max,
                                      sum_exp,
                                      gradient,
                                      {T * V, V}},
                                     stream);
}

}  // extern "C"
