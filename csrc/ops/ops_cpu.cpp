// The ops on CPU tensors.

#include <dlfcn.h>

#include "core/kernels.h"
#include "cpu/pages.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace simpo_ext::ops {
namespace {

// Of torch's stable ABI from 2.11 on, a version later than the one this is built for.
using FromBlob = AOTITorchError (*)(void* data, int64_t dim, const int64_t* sizes,
                                    const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                    int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* result, int32_t layout,
                                    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                    void (*deleter)(void* data, void* context), void* context);

FromBlob from_blob_of_this_torch() {
  static const FromBlob from_blob = [] {
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<FromBlob>(
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "torch_from_blob"));
  }();
  return from_blob;
}

// Contiguous zeros in the shape of like. Nothing, where torch or the system cannot give them.
std::optional<Tensor> try_new_zeros(const Tensor& like, size_t bytes) {
  const FromBlob from_blob = from_blob_of_this_torch();
  void* data = from_blob == nullptr ? nullptr : cpu::map_zeros(bytes);
  if (data == nullptr) return std::nullopt;
  const int64_t T = like.size(1), V = like.size(2);
  const int64_t sizes[] = {like.size(0), T, V}, strides[] = {T * V, V, 1};
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  constexpr int32_t kNoIndex = -1;  // as CPU tensors have
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = from_blob(
      data, 3, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), kNoIndex, &handle,
      aoti_torch_layout_strided(), nullptr, 0,
      [](void* mapped, void* length) { cpu::unmap(mapped, reinterpret_cast<uintptr_t>(length)); },
      reinterpret_cast<void*>(bytes));
  if (error != AOTI_TORCH_SUCCESS) {
    cpu::unmap(data, bytes);
    return std::nullopt;
  }
  return Tensor(handle);
}

// Threads come from torch's intra-op pool, so torch.set_num_threads governs them.
constexpr ParallelFor kTorchThreads{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      torch::stable::parallel_for(begin, end, grain,
                                  [body, context](int64_t b, int64_t e) { body(b, e, context); });
    },
    [] { return static_cast<int64_t>(torch::stable::get_num_threads()); }};

class Cpu {
 public:
  Cpu(const Tensor& tensor, const char* name) { check(tensor, name); }

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }

  NewGradient new_gradient(const Tensor& logits) const {
    const size_t bytes = static_cast<size_t>(logits.numel() * logits.element_size());
    if (bytes < cpu::kLargeBytes) return new_empty_gradient(logits);
    if (std::optional<Tensor> zeros = try_new_zeros(logits, bytes)) return {*zeros, true};
    const NewGradient gradient = new_empty_gradient(logits);
    cpu::advise_huge_pages(gradient.tensor.mutable_data_ptr(), bytes);
    return gradient;
  }

  void token_logps(const TokenLogpsArgs& args) const {
    check_labels_in_range(cpu::token_logps(args, kTorchThreads), args.targets.ignore_index, args.V);
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_labels_in_range(cpu::token_logps_backward(args, kTorchThreads), args.targets.ignore_index,
                          args.V);
  }
  void sequence_logps(const SequenceLogpsArgs& args) const {
    cpu::sequence_logps(args, kTorchThreads);
  }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    cpu::sequence_logps_backward(args, kTorchThreads);
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    cpu::preference_loss(args, kTorchThreads);
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    cpu::preference_loss_backward(args, kTorchThreads);
  }
};

}  // namespace
}  // namespace simpo_ext::ops

STABLE_TORCH_LIBRARY_IMPL(simpo_ext, CPU, m) {
  simpo_ext::ops::register_ops<simpo_ext::ops::Cpu>(m);
}
