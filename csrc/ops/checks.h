// What an op demands of its tensors. Python and C++ callers check first and word it for users;
// these checks keep a direct call of torch.ops.simpo_ext from reading memory that is not there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/kernels.h"

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

// The dtype of logps and losses, and its counterpart among the element types.
inline ScalarType compute_scalar_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline DType compute_dtype_of(const Tensor& tensor, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype == DType::kFloat64 || dtype == DType::kFloat32, name,
                  ": expected float32 or float64, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return dtype;
}

// std::out_of_range is an IndexError in Python.
inline void check_labels_in_range(const LabelError& error, int64_t ignore_index, int64_t V,
                                  bool is_flat = false) {
  if (!error.found()) return;
  const std::string row = is_flat ? "" : std::to_string(error.b) + ", ";
  throw std::out_of_range("labels[" + row + std::to_string(error.position) +
                          "] is out of range: expected ignore_index (" +
                          std::to_string(ignore_index) + ") or a value in [0, " +
                          std::to_string(V) + "), got " + std::to_string(error.label));
}

// Of a layout that a kernel refused; std::invalid_argument is a ValueError in Python.
inline void check_layout(const LayoutError& error) {
  using Kind = LayoutError::Kind;
  const std::string at = "cu_seqlens[" + std::to_string(error.index) + "]: expected ";
  const std::string got = ", got " + std::to_string(error.value);
  switch (error.kind) {
    case Kind::kNone:
      return;
    case Kind::kBegin:
      throw std::invalid_argument(at + "0 or more" + got);
    case Kind::kOrder:
      throw std::invalid_argument(at + "at least the " + std::to_string(error.bound) +
                                  " before it" + got);
    case Kind::kEnd:
      throw std::invalid_argument(at + "at most N = " + std::to_string(error.bound) + got);
    case Kind::kPair:
      throw std::out_of_range("pairs[" + std::to_string(error.index / 2) + ", " +
                              std::to_string(error.index % 2) +
                              "] is out of range: expected a sequence in [0, " +
                              std::to_string(error.bound) + ")" + got);
  }
}

}  // namespace simpo_ext::ops
