// The Device for CUDA tensors: see implementations.h.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

#include "core/kernels.h"
#include "cuda/device.h"
#include "ops/build_info.h"
#include "ops/checks.h"
#include "ops/cuda_kernels.h"
#include "ops/cuda_torch.h"
#include "ops/linear/cublas.h"
#include "ops/linear/plan.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

// The kernels use bfloat16 instructions, which older GPUs lack.
constexpr int kLeastCapability = 80;

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

inline void check_cuda_launch(int error) {
  if (error == 0) return;
  const BuildInfo info = build_info();
  if (cuda::is_unsupported_architecture(error)) {
    const int capability = cuda::compute_capability();
    STD_TORCH_CHECK(capability >= kLeastCapability,
                    "simpo_ext needs a GPU of compute capability 8.0 or higher, got ",
                    capability / 10, ".", capability % 10, "; move the tensors with .cpu()");
    STD_TORCH_CHECK(false, "this build of simpo_ext has CUDA kernels for architectures ",
                    info.cuda_archs, ", and this GPU is of architecture ", capability,
                    "; build simpo_ext from source with SIMPO_CUDA_ARCHS=", capability,
                    ", or move the tensors with .cpu()");
  }
  if (cuda::is_insufficient_driver(error)) {
    STD_TORCH_CHECK(false, "this build of simpo_ext needs an NVIDIA driver for CUDA ",
                    version_text(info.cuda_runtime_version), ", and the installed one supports ",
                    version_text(cuda::driver_version()),
                    "; update the driver, or build simpo_ext from source with an older nvcc");
  }
  STD_TORCH_CHECK(false, "a CUDA kernel of simpo_ext was not launched: ", cuda::error_name(error),
                  ": ", cuda::error_text(error));
}

class Cuda : public CudaKernels<Cuda> {
 public:
  static constexpr int64_t kChunkColumns = kCudaChunkColumns;

  Cuda(const Tensor& tensor, const char* name)
      : device_index_(checked_index(tensor, name)), guard_(device_index_) {
    check_launch(cuda::use_device(device_index_));
    stream_ = current_stream(device_index_);
  }

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_index_, name,
                    ": expected a tensor on device cuda:", device_index_,
                    ", got one on another device");
  }

  LargeTensor new_large(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return new_empty_large(like, sizes);
  }
  Tensor new_large_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return new_empty(like, sizes);
  }

  static bool adds_products() { return CuBlas::of_torch().is_available(); }
  void add_product(const Tensor& sum, const Tensor& a, const Tensor& b, bool is_first) const {
    const CuBlas& cublas = CuBlas::of_torch();
    void* handle = nullptr;
    STD_TORCH_CHECK(cublas.get_handle(&handle) == 0, "torch has no cuBLAS handle for device ",
                    device_index_);
    cublas::add_product(cublas.gemm, handle, sum, a, b, is_first);
  }

  cuda::Stream stream() const { return stream_; }
  static void check_launch(int error) { check_cuda_launch(error); }

 private:
  static int32_t checked_index(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_cuda(), name, ": expected a CUDA tensor, got one on another device");
    STD_TORCH_CHECK(!is_torch_for_rocm(), name,
                    ": simpo_ext has kernels for NVIDIA GPUs and for CPUs, got a tensor on a GPU "
                    "under ROCm; move it with .cpu()");
    return tensor.get_device_index();
  }

  int32_t device_index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace simpo_ext::ops
