// Checks of the tensors that an op gets, and the dtypes of its kernels. The front ends check first,
// with messages for their users. These checks keep a direct call of torch.ops.simpo_ext from
// reading or writing outside its tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/dtypes.h"

namespace simpo_ext::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes,
                        const char* name) {
  bool matches = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) matches = matches && tensor.size(d++) == size;
  STD_TORCH_CHECK(matches, name, ": expected shape ", shape_text(sizes), ", got ",
                  shape_text(tensor));
}

// expected: the shape in letters, such as "[B, T, V]".
inline void check_dim(const Tensor& tensor, int64_t dim, const char* name, const char* expected) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected shape ", expected, ", got ",
                  shape_text(tensor));
}

// ---- dtypes ---------------------------------------------------------------------------------

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
  return DType::kFloat32;  // not reached
}

// The compute dtype of a tensor's dtype: that of logps and losses.
inline DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
inline ScalarType compute_scalar_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The dtype of a tensor that must have a compute dtype.
inline DType compute_dtype_of(const Tensor& tensor, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype == DType::kFloat64 || dtype == DType::kFloat32, name,
                  ": expected float32 or float64, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return dtype;
}

}  // namespace simpo_ext::ops
