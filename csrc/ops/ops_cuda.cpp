// The ops on CUDA tensors. In a build without nvcc they say so.

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/linear_ops.h"
#include "ops/ops.h"
#include "ops/registration.h"
#include "ops/vocab_ops.h"

#ifdef SIMPO_WITH_CUDA

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "cuda/device.h"
#include "ops/build_info.h"

// Defined in libtorch_cuda alone, which a CPU build of torch lacks.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace simpo_ext::ops {
namespace {

// ROCm's tensors come under CUDA's dispatch key.
bool is_torch_for_rocm() {
  static const bool is_loaded = dlopen("libtorch_hip.so", RTLD_NOLOAD | RTLD_LAZY) != nullptr;
  return is_loaded;
}

cuda::Stream current_stream(int32_t device_index) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    if (aoti_torch_get_current_cuda_stream != nullptr) return &aoti_torch_get_current_cuda_stream;
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol =
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  STD_TORCH_CHECK(get_stream != nullptr,
                  "the torch of this process does not say which CUDA stream is current; expected "
                  "a CUDA build of torch >= ",
                  build_info().torch_target);
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device_index, &stream) == 0, "torch has no current stream of device ",
                  device_index);
  return stream;
}

// The kernels use bfloat16 instructions of it.
constexpr int kLeastCapability = 80;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void check_launch(int error) {
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

class Cuda {
 public:
  // Wide enough that a product keeps every multiprocessor busy for many waves, and that adding up
  // the chunks' shares of dhidden stays a few percent.
  static constexpr int64_t kChunkColumns = 8192;

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

  int64_t shared_segments(DType dtype, int64_t N, int64_t V) const {
    return cuda::shared_segments(dtype, N, V);
  }
  void token_logps(const TokenLogpsArgs& args) const {
    check_launch(cuda::token_logps(args, stream_));
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_launch(cuda::token_logps_backward(args, stream_));
  }
  // Rows past the last valid token are computed, and count for nothing: the host does not know how
  // many there are.
  int64_t select_tokens(const SelectTokensArgs& args) const {
    check_launch(cuda::select_tokens(args, stream_));
    return args.R;
  }
  void gather_rows(const GatherRowsArgs& args) const {
    check_launch(cuda::gather_rows(args, stream_));
  }
  void write_logps(const WriteLogpsArgs& args) const {
    check_launch(cuda::write_logps(args, stream_));
  }
  void put_label_gradients(const PutLabelGradientsArgs& args) const {
    check_launch(cuda::put_label_gradients(args, stream_));
  }
  void add_partial(const AddPartialArgs& args) const {
    check_launch(cuda::add_partial(args, stream_));
  }
  void hidden_gradient(const HiddenGradientArgs& args) const {
    check_launch(cuda::hidden_gradient(args, stream_));
  }
  void merge_shards(const MergeShardsArgs& args) const {
    check_launch(cuda::merge_shards(args, stream_));
  }
  void add_label_shares(const AddLabelSharesArgs& args) const {
    check_launch(cuda::add_label_shares(args, stream_));
  }
  void scatter_rows(const ScatterRowsArgs& args) const {
    check_launch(cuda::scatter_rows(args, stream_));
  }
  void sequence_targets(const SequenceTargetsArgs& args) const {
    check_launch(cuda::sequence_targets(args, stream_));
  }
  void sequence_logps(const SequenceLogpsArgs& args) const {
    check_launch(cuda::sequence_logps(args, stream_));
  }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    check_launch(cuda::sequence_logps_backward(args, stream_));
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    check_launch(cuda::preference_loss(args, stream_));
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    check_launch(cuda::preference_loss_backward(args, stream_));
  }

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

}  // namespace
}  // namespace simpo_ext::ops

#else

namespace simpo_ext::ops {
namespace {

class Cuda {
 public:
  static constexpr int64_t kChunkColumns = 8192;

  Cuda(const Tensor&, const char* name) {
    STD_TORCH_CHECK(false, name,
                    ": this build of simpo_ext has kernels for CPU tensors only, got a CUDA "
                    "tensor; move it with .cpu(), or build simpo_ext from source where nvcc is");
  }
  void check(const Tensor&, const char*) const {}
  LargeTensor new_large(const Tensor& like, std::initializer_list<int64_t>) const {
    return {like, false};
  }
  Tensor new_large_for_writing(const Tensor& like, std::initializer_list<int64_t>) const {
    return like;
  }
  int64_t shared_segments(DType, int64_t, int64_t) const { return 0; }
  void token_logps(const TokenLogpsArgs&) const {}
  void token_logps_backward(const TokenLogpsBackwardArgs&) const {}
  int64_t select_tokens(const SelectTokensArgs&) const { return 0; }
  void gather_rows(const GatherRowsArgs&) const {}
  void write_logps(const WriteLogpsArgs&) const {}
  void put_label_gradients(const PutLabelGradientsArgs&) const {}
  void add_partial(const AddPartialArgs&) const {}
  void hidden_gradient(const HiddenGradientArgs&) const {}
  void merge_shards(const MergeShardsArgs&) const {}
  void add_label_shares(const AddLabelSharesArgs&) const {}
  void scatter_rows(const ScatterRowsArgs&) const {}
  void sequence_targets(const SequenceTargetsArgs&) const {}
  void sequence_logps(const SequenceLogpsArgs&) const {}
  void sequence_logps_backward(const SequenceLogpsBackwardArgs&) const {}
  void preference_loss(const PreferenceLossArgs&) const {}
  void preference_loss_backward(const PreferenceLossBackwardArgs&) const {}
};

}  // namespace
}  // namespace simpo_ext::ops

#endif

namespace simpo_ext::ops {

void register_cuda_ops(Library& m) {
  register_ops<Cuda>(m);
  register_linear_ops<Cuda>(m);
  register_vocab_ops<Cuda>(m);
}

}  // namespace simpo_ext::ops
