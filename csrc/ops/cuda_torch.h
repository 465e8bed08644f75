// The functions of a CUDA build of torch: its current stream and its cuBLAS. The library looks them
// up when it runs, since it also works with a CPU build of torch.
#pragma once

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/build_info.h"
#include "ops/linear/cublas.h"

// Only libtorch_cuda defines it, which a CPU build of torch lacks.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace simpo_ext::ops {

// A function of libtorch_cuda or of a library that it is linked to; null if this torch lacks it.
template <class Function>
Function function_of_torch(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Function>(dlsym(library != nullptr ? library : RTLD_DEFAULT, name));
}

// Under ROCm, tensors have CUDA's dispatch key too.
inline bool is_torch_for_rocm() {
  static const bool is_loaded = dlopen("libtorch_hip.so", RTLD_NOLOAD | RTLD_LAZY) != nullptr;
  return is_loaded;
}

inline cuda::Stream current_stream(int32_t device_index) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    if (aoti_torch_get_current_cuda_stream != nullptr) return &aoti_torch_get_current_cuda_stream;
    return function_of_torch<GetStream>("aoti_torch_get_current_cuda_stream");
  }();
  STD_TORCH_CHECK(get_stream != nullptr,
                  "expected a CUDA build of torch >= ", build_info().torch_target,
                  ", got a torch that cannot tell the current CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device_index, &stream) == 0,
                  "torch has no current CUDA stream for device ", device_index);
  return stream;
}

// cublasGemmEx, and torch's handle for the current device and stream. A torch that has cuBLAS
// linked in statically does not export cublasGemmEx.
struct CuBlas {
  using GetHandle = int32_t (*)(void** handle);

  GetHandle get_handle = function_of_torch<GetHandle>("torch_get_current_cuda_blas_handle");
  cublas::GemmEx gemm = function_of_torch<cublas::GemmEx>("cublasGemmEx");

  bool is_available() const { return get_handle != nullptr && gemm != nullptr; }

  static const CuBlas& of_torch() {
    static const CuBlas cublas;
    return cublas;
  }
};

}  // namespace simpo_ext::ops
