// The ops on CPU tensors.

#include <dlfcn.h>

#include "core/kernels.h"
#include "cpu/pages.h"
#include "ops/checks.h"
#include "ops/linear_ops.h"
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

// Contiguous zeros. Nothing, where torch or the system cannot give them.
std::optional<Tensor> try_new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes,
                                    size_t bytes) {
  const FromBlob from_blob = from_blob_of_this_torch();
  void* data = from_blob == nullptr ? nullptr : cpu::map_zeros(bytes);
  if (data == nullptr) return std::nullopt;
  const ContiguousStrides strides(sizes);
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  constexpr int32_t kNoIndex = -1;  // as CPU tensors have
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = from_blob(
      data, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), 0, dtype,
      aoti_torch_device_type_cpu(), kNoIndex, &handle, aoti_torch_layout_strided(), nullptr, 0,
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
  // A chunk of logits that stays in a core's share of the last-level cache from product to kernel
  // to product; fewer columns would cost the products.
  static constexpr int64_t kChunkColumns = 4096;

  Cpu(const Tensor& tensor, const char* name) { check(tensor, name); }

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }

  LargeTensor new_large(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    size_t bytes = static_cast<size_t>(like.element_size());
    for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
    if (bytes < cpu::kLargeBytes) return new_empty_large(like, sizes);
    if (std::optional<Tensor> zeros = try_new_zeros(like, sizes, bytes)) return {*zeros, true};
    const LargeTensor large = new_empty_large(like, sizes);
    cpu::advise_huge_pages(large.tensor.mutable_data_ptr(), bytes);
    return large;
  }

  void token_logps(const TokenLogpsArgs& args) const {
    check_labels_in_range(cpu::token_logps(args, kTorchThreads), args.targets.ignore_index, args.V);
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_labels_in_range(cpu::token_logps_backward(args, kTorchThreads), args.targets.ignore_index,
                          args.V);
  }
  int64_t select_tokens(const SelectTokensArgs& args) const {
    const cpu::Selection selection = cpu::select_tokens(args);
    check_labels_in_range(selection.error, args.targets.ignore_index, args.num_labels);
    if (selection.count > args.R) {
      throw std::invalid_argument("num_valid_tokens: expected at least the " +
                                  std::to_string(selection.count) +
                                  " valid tokens of labels, got " + std::to_string(args.R));
    }
    return selection.count;
  }
  void gather_rows(const GatherRowsArgs& args) const { cpu::gather_rows(args, kTorchThreads); }
  void write_logps(const WriteLogpsArgs& args) const { cpu::write_logps(args); }
  void put_label_gradients(const PutLabelGradientsArgs& args) const {
    cpu::put_label_gradients(args);
  }
  void add_partial(const AddPartialArgs& args) const { cpu::add_partial(args, kTorchThreads); }
  void hidden_gradient(const HiddenGradientArgs& args) const {
    cpu::hidden_gradient(args, kTorchThreads);
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
  simpo_ext::ops::register_linear_ops<simpo_ext::ops::Cpu>(m);
}
