#include "ops/cpu_memory.h"

#include <dlfcn.h>

#include <cstdint>
#include <optional>

#include "cpu/pages.h"

namespace simpo_ext::ops {
namespace {

// This function is in torch's stable ABI from 2.11 on. The library is built for an older version.
using FromBlob = AOTITorchError (*)(void* data, int64_t dim, const int64_t* sizes,
                                    const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                    int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* result, int32_t layout,
                                    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                    void (*deleter)(void* data, void* context), void* context);

// Null if this torch lacks it.
FromBlob from_blob_of_this_torch() {
  static const FromBlob from_blob = [] {
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<FromBlob>(
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "torch_from_blob"));
  }();
  return from_blob;
}

// A contiguous tensor in memory that release(data, context) takes back; nullopt if torch fails.
std::optional<Tensor> try_tensor_of(const Tensor& like, std::initializer_list<int64_t> sizes,
                                    void* data, void (*release)(void* data, void* context),
                                    void* context) {
  const FromBlob from_blob = from_blob_of_this_torch();
  const ContiguousStrides strides(sizes);
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  constexpr int32_t kNoIndex = -1;  // the device index of CPU tensors
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

// Zeros; nullopt if torch or the system cannot provide them.
std::optional<Tensor> try_new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes,
                                    size_t bytes) {
  if (from_blob_of_this_torch() == nullptr) return std::nullopt;
  void* const data = cpu::map_zeros(bytes);
  if (data == nullptr) return std::nullopt;
  return try_tensor_of(
      like, sizes, data, [](void* mapped, void* length) { cpu::unmap(mapped, bytes_of(length)); },
      as_context(bytes));
}

// Memory that earlier calls may have used; nullopt as above.
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

}  // namespace

LargeTensor new_large_cpu_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const size_t bytes = bytes_of(like, sizes);
  if (bytes < cpu::kLargeBytes) return new_empty_large(like, sizes);
  if (std::optional<Tensor> zeros = try_new_zeros(like, sizes, bytes)) return {*zeros, true};
  return {new_on_huge_pages(like, sizes, bytes), false};
}

Tensor new_large_cpu_tensor_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const size_t bytes = bytes_of(like, sizes);
  if (bytes < cpu::kLargeBytes) return new_empty(like, sizes);
  if (std::optional<Tensor> tensor = try_new_for_writing(like, sizes, bytes)) return *tensor;
  return new_on_huge_pages(like, sizes, bytes);
}

}  // namespace simpo_ext::ops
