// The CUDA kernels, emulated, as the ops on CPU tensors: loaded after simpo_ext, this library takes
// the place of the CPU kernels, so that every test of the Python API tests the CUDA kernels
// instead. Products are torch's of CPU tensors, but for those that cuBLAS adds up: gemm.h has them.

#include "core/kernels.h"
#include "gemm.h"
#include "ops/checks.h"
#include "ops/cublas.h"
#include "ops/linear_ops.h"
#include "ops/ops.h"
#include "ops/vocab_ops.h"

namespace simpo_ext::ops {
namespace {

bool has_cublas = true;

struct Calls {
  int64_t add_product = 0, add_partial = 0;
} calls;

class EmulatedCuda {
 public:
  static constexpr int64_t kChunkColumns = 4096;  // of the CPU, whose fake kernels are in use

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

  int64_t shared_segments(DType dtype, int64_t N, int64_t V) const {
    return cuda::shared_segments(dtype, N, V);
  }
  void token_logps(const TokenLogpsArgs& args) const {
    check_launch(cuda::token_logps(args, nullptr));
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_launch(cuda::token_logps_backward(args, nullptr));
  }
  // Rows past the last valid token are computed, and count for nothing: the host does not know how
  // many there are.
  int64_t select_tokens(const SelectTokensArgs& args) const {
    check_launch(cuda::select_tokens(args, nullptr));
    return args.R;
  }
  void gather_rows(const GatherRowsArgs& args) const {
    check_launch(cuda::gather_rows(args, nullptr));
  }
  void write_logps(const WriteLogpsArgs& args) const {
    check_launch(cuda::write_logps(args, nullptr));
  }
  void put_label_gradients(const PutLabelGradientsArgs& args) const {
    check_launch(cuda::put_label_gradients(args, nullptr));
  }
  void add_partial(const AddPartialArgs& args) const {
    ++calls.add_partial;
    check_launch(cuda::add_partial(args, nullptr));
  }
  void hidden_gradient(const HiddenGradientArgs& args) const {
    check_launch(cuda::hidden_gradient(args, nullptr));
  }
  void merge_shards(const MergeShardsArgs& args) const {
    check_launch(cuda::merge_shards(args, nullptr));
  }
  void add_label_shares(const AddLabelSharesArgs& args) const {
    check_launch(cuda::add_label_shares(args, nullptr));
  }
  void scatter_rows(const ScatterRowsArgs& args) const {
    check_launch(cuda::scatter_rows(args, nullptr));
  }
  void sequence_targets(const SequenceTargetsArgs& args) const {
    check_launch(cuda::sequence_targets(args, nullptr));
  }
  void sequence_logps(const SequenceLogpsArgs& args) const {
    check_launch(cuda::sequence_logps(args, nullptr));
  }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    check_launch(cuda::sequence_logps_backward(args, nullptr));
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    check_launch(cuda::preference_loss(args, nullptr));
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    check_launch(cuda::preference_loss_backward(args, nullptr));
  }

 private:
  static void check_launch(int error) {
    STD_TORCH_CHECK(error == 0, "an emulated kernel was not launched: error ", error);
  }
};

}  // namespace
}  // namespace simpo_ext::ops

// For tests, by ctypes: whether there is a cublasGemmEx, as on a GPU with torch's usual builds; and
// how often the two ways of adding up dhidden were taken since the last call.
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
  simpo_ext::ops::register_linear_ops<simpo_ext::ops::EmulatedCuda>(m);
  simpo_ext::ops::register_vocab_ops<simpo_ext::ops::EmulatedCuda>(m);
}
