// The functions of CUDA that the kernels use. For the kernels, only this header includes the CUDA
// toolkit. They also use CUDA's language: __global__, __syncthreads, threadIdx ...
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#define SIMPO_DEVICE __device__ __forceinline__
#define SIMPO_SHARED(T, name, n) __shared__ T name[n]
#define SIMPO_UNROLL _Pragma("unroll")

namespace simpo_ext::cuda {

using Stream = void*;  // cudaStream_t

constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

// The number of blocks that keep the memory busy: five on each of an H200's 132 multiprocessors.
constexpr int64_t kBusyBlocks = 660;

// While an object of this class exists, this thread may initialize the runtime and load code even
// during the capture of a CUDA graph. The first call of a process does both.
class CaptureModeRelaxed {
 public:
  CaptureModeRelaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureModeRelaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureModeRelaxed(const CaptureModeRelaxed&) = delete;
  CaptureModeRelaxed& operator=(const CaptureModeRelaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the thread's own mode
};

// Enqueues the kernel. Returns 0, or the cudaError_t of a failed launch.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
           Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  const CaptureModeRelaxed relaxed;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // clears it: the next launch would return it again
  return static_cast<int>(error);
}

// ---- global memory --------------------------------------------------------------------------

struct alignas(16) Vector16 {
  uint32_t words[4];
};

template <typename T>
SIMPO_DEVICE T load(const T* pointer) {
  return *pointer;
}

// A load from an address that all threads of the block read.
template <typename T>
SIMPO_DEVICE T load_uniform(const T* pointer) {
  return *pointer;
}

// Like load_uniform, but the load stays in its place. The compiler may move an ordinary load below
// a branch that does not need it, and the row would then wait for memory twice.
template <typename T>
SIMPO_DEVICE T load_uniform_early(const T* pointer) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(pointer));
    memcpy(&value, &bits, sizeof(value));
  } else {
    uint64_t bits;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(bits) : "l"(pointer));
    memcpy(&value, &bits, sizeof(value));
  }
  return value;
}

template <typename T>
SIMPO_DEVICE void store(T* pointer, T value) {
  *pointer = value;
}

// For data that is read once: bypasses the first-level cache. Volatile and with a memory clobber,
// because this thread may store to the pointer later (a gradient in place).
SIMPO_DEVICE Vector16 load_streaming(const Vector16* pointer) {
  Vector16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(pointer)
               : "memory");
  return v;
}

// For data whose cache line another load of the warp uses, too.
SIMPO_DEVICE Vector16 load_cached(const Vector16* pointer) { return *pointer; }

SIMPO_DEVICE void store_streaming(Vector16* pointer, Vector16 v) {
  __stcs(reinterpret_cast<uint4*>(pointer),
         make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]));
}

// ---- instructions that C++ cannot express ---------------------------------------------------

// 2^x within 2 ulp; exact at 0; 0 where the result would be subnormal.
SIMPO_DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x within 1 ulp; 0 for an infinity.
SIMPO_DEVICE float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A product that is never fused with a sum.
SIMPO_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
SIMPO_DEVICE double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }

SIMPO_DEVICE float widen_float16(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

// Two values rounded to nearest even, the first in the low half.
SIMPO_DEVICE uint32_t narrow_bfloat16x2(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

SIMPO_DEVICE uint32_t narrow_float16x2(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// The larger of each half; the number if the other is NaN.
SIMPO_DEVICE uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

SIMPO_DEVICE uint32_t max_float16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

}  // namespace simpo_ext::cuda
