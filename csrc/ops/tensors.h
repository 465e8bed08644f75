// New tensors, and strides as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "core/views.h"
#include "ops/checks.h"

namespace simpo_ext::ops {

// The strides of a contiguous tensor that has at most three dimensions.
class ContiguousStrides {
 public:
  explicit ContiguousStrides(std::initializer_list<int64_t> sizes) {
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides_[d] = stride;
      stride *= std::max<int64_t>(sizes.begin()[d], 1);
    }
  }

  const int64_t* data() const { return strides_.data(); }

 private:
  std::array<int64_t, 3> strides_{};
};

// An uninitialized contiguous tensor that has at most three dimensions, on the device of `like`.
// Its dtype is that of `like` unless one is given. The function of torch::stable looks up an op by
// name and dispatches it: for the nine small tensors of preference_loss, this takes longer than the
// loss itself.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        std::optional<ScalarType> dtype = std::nullopt) {
  const ContiguousStrides strides(sizes);
  using torch::stable::detail::from, torch::stable::detail::to;
  const auto shim_dtype = to<int32_t>(from(dtype.value_or(like.scalar_type())));
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.begin(), strides.data(), shim_dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// A new contiguous tensor that the caller writes.
struct LargeTensor {
  Tensor tensor;
  bool holds_zeros;
};

inline LargeTensor new_empty_large(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return {new_empty(like, sizes), false};
}

// The check saves the dispatch of an op if nothing has to be copied.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// tensor [B, T] or [B, T, ...]
inline TokenStrides token_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1)};
}

}  // namespace simpo_ext::ops
