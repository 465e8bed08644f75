// The emulated CUDA kernels as the ops on CPU tensors. This library is loaded after simpo_ext and
// replaces the CPU kernels, so that every test of the Python API tests the CUDA kernels instead.
// Matrix products are torch's for CPU tensors, except those that cuBLAS would add to a sum: gemm.h
// has them.

#include <torch/csrc/stable/library.h>

#include "core/kernels.h"
#include "gemm.h"
#include "ops/checks.h"
#include "ops/cuda_kernels.h"
#include "ops/implementations.h"
#include "ops/linear/cublas.h"
#include "ops/linear/plan.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {
namespace {

bool has_cublas = true;

struct Calls {
  int64_t add_product = 0, add_partial = 0;
} calls;

class EmulatedCuda : public CudaKernels<EmulatedCuda> {
 public:
  // The fake kernels take CPU tensors for the CPU's.
  static constexpr int64_t kChunkColumns = kCpuChunkColumns;

  EmulatedCuda(const Tensor& tensor, const char* name) { check(tensor, name); }

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }

  LargeTensor new_large(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return new_empty_large(like, sizes);
  }
  Tensor new_large_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return new_empty(like, sizes);
  }

  static bool adds_products() { return has_cublas; }
  void add_product(const Tensor& sum, const Tensor& a, const Tensor& b, bool is_first) const {
    ++calls.add_product;
    cublas::add_product(emulation::gemm_ex, nullptr, sum, a, b, is_first);
  }
  void add_partial(const AddPartialArgs& args) const {
    ++calls.add_partial;
    CudaKernels::add_partial(args);
  }

  static cuda::Stream stream() { return nullptr; }
  static void check_launch(int error) {
    STD_TORCH_CHECK(error == 0, "an emulated kernel was not launched: error ", error);
  }
};

}  // namespace
}  // namespace simpo_ext::ops

// For tests, by ctypes: whether there is a cublasGemmEx, as with torch's usual CUDA builds; and how
// often each of the two ways to add up dhidden was used since the last call.
extern "C" __attribute__((visibility("default"))) void emulated_cublas(bool is_available) {
  simpo_ext::ops::has_cublas = is_available;
}

extern "C" __attribute__((visibility("default"))) void take_emulated_calls(int64_t* add_product,
                                                                           int64_t* add_partial) {
  using simpo_ext::ops::calls;
  *add_product = calls.add_product;
  *add_partial = calls.add_partial;
  calls = {};
}

STABLE_TORCH_LIBRARY_IMPL(simpo_ext, CPU, m) {
  simpo_ext::ops::register_ops<simpo_ext::ops::EmulatedCuda>(m);
}
