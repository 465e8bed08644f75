// The ops on CPU tensors.

#include <dlfcn.h>

#include "core/kernels.h"
#include "cpu/pages.h"
#include "ops/checks.h"
#include "ops/linear_ops.h"
#include "ops/ops.h"
#include "ops/registration.h"
#include "ops/vocab_ops.h"

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

// A contiguous tensor in memory that release(data, context) takes back. Nothing, where torch cannot
// make one.
std::optional<Tensor> try_tensor_of(const Tensor& like, std::initializer_list<int64_t> sizes,
                                    void* data, void (*release)(void* data, void* context),
                                    void* context) {
  const FromBlob from_blob = from_blob_of_this_torch();
  const ContiguousStrides strides(sizes);
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  constexpr int32_t kNoIndex = -1;  // as CPU tensors have
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      from_blob(data, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), 0, dtype,
                aoti_torch_device_type_cpu(), kNoIndex, &handle, aoti_torch_layout_strided(),
                nullptr, 0, release, context);
  if (error != AOTI_TORCH_SUCCESS) {
    release(data, context);
    return std::nullopt;
  }
  return Tensor(handle);
}

void* as_context(size_t bytes) { return reinterpret_cast<void*>(bytes); }
size_t bytes_of(void* context) { return reinterpret_cast<uintptr_t>(context); }

// Zeros. Nothing, where torch or the system cannot give them; as below.
std::optional<Tensor> try_new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes,
                                    size_t bytes) {
  if (from_blob_of_this_torch() == nullptr) return std::nullopt;
  void* const data = cpu::map_zeros(bytes);
  if (data == nullptr) return std::nullopt;
  return try_tensor_of(
      like, sizes, data, [](void* mapped, void* length) { cpu::unmap(mapped, bytes_of(length)); },
      as_context(bytes));
}

// Memory that may have been in use before.
std::optional<Tensor> try_new_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes,
                                          size_t bytes) {
  if (from_blob_of_this_torch() == nullptr) return std::nullopt;
  const cpu::Mapping mapping = cpu::map_for_writing(bytes);
  if (mapping.data == nullptr) return std::nullopt;
  return try_tensor_of(
      like, sizes, mapping.data,
      [](void* mapped, void* length) { cpu::keep_for_writing({mapped, bytes_of(length)}); },
      as_context(mapping.bytes));
}

size_t bytes_of(const Tensor& like, std::initializer_list<int64_t> sizes) {
  size_t bytes = static_cast<size_t>(like.element_size());
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  return bytes;
}

Tensor new_on_huge_pages(const Tensor& like, std::initializer_list<int64_t> sizes, size_t bytes) {
  const Tensor tensor = new_empty(like, sizes);
  cpu::advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
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
    const size_t bytes = bytes_of(like, sizes);
    if (bytes < cpu::kLargeBytes) return new_empty_large(like, sizes);
    if (std::optional<Tensor> zeros = try_new_zeros(like, sizes, bytes)) return {*zeros, true};
    return {new_on_huge_pages(like, sizes, bytes), false};
  }
  Tensor new_large_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    const size_t bytes = bytes_of(like, sizes);
    if (bytes < cpu::kLargeBytes) return new_empty(like, sizes);
    if (std::optional<Tensor> tensor = try_new_for_writing(like, sizes, bytes)) return *tensor;
    return new_on_huge_pages(like, sizes, bytes);
  }

  int64_t shared_segments(DType, int64_t, int64_t) const { return 0; }
  void token_logps(const TokenLogpsArgs& args) const {
    check_labels_in_range(cpu::token_logps(args, kTorchThreads), args.targets.ignore_index,
                          args.num_labels);
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_labels_in_range(cpu::token_logps_backward(args, kTorchThreads), args.targets.ignore_index,
                          args.num_labels);
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
  void merge_shards(const MergeShardsArgs& args) const { cpu::merge_shards(args); }
  void add_label_shares(const AddLabelSharesArgs& args) const {
    cpu::add_label_shares(args, kTorchThreads);
  }
  void scatter_rows(const ScatterRowsArgs& args) const { cpu::scatter_rows(args, kTorchThreads); }
  void sequence_targets(const SequenceTargetsArgs& args) const {
    const cpu::TargetError error = cpu::sequence_targets(args);
    check_layout(error.layout);
    check_labels_in_range(error.label, args.labels.ignore_index, args.num_labels, true);
  }
  void sequence_logps(const SequenceLogpsArgs& args) const {
    check_layout(cpu::sequence_logps(args, kTorchThreads));
  }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    check_layout(cpu::sequence_logps_backward(args, kTorchThreads));
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    check_layout(cpu::preference_loss(args, kTorchThreads));
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    check_layout(cpu::preference_loss_backward(args, kTorchThreads));
  }
};

}  // namespace

void register_cpu_ops(Library& m) {
  register_ops<Cpu>(m);
  register_linear_ops<Cpu>(m);
  register_vocab_ops<Cpu>(m);
}

}  // namespace simpo_ext::ops
