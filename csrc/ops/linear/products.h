// Torch's matrix products, written into existing tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "ops/checks.h"

namespace simpo_ext::ops {

// out = a b
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // frees the returned handle, which is a second handle of out
}

// out = a b^T + bias, rounded once
inline void linear_into(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(a), from(b), from(std::optional<Tensor>(bias)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace simpo_ext::ops
