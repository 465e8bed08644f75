// The arguments of an op from hidden states, checked, and the chunks of its vocabulary.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/linear/products.h"

namespace simpo_ext::ops {

// logits = hidden weight^T + bias. Holds references to the op's arguments.
struct Problem {
  DType dtype;
  ScalarType compute;
  int64_t B, T, V, H;
  const Tensor& weight;               // [V, H]
  const std::optional<Tensor>& bias;  // [V]
  VocabPart part;                     // the labels of weight's rows
  Targets targets;

  template <class Device>
  Problem(const Device& device, const Tensor& hidden, const Tensor& weight_,
          const std::optional<Tensor>& bias_, const Tensor& labels, const Scoring& scoring,
          std::optional<VocabPart> part_ = std::nullopt)
      : weight(weight_), bias(bias_) {
    dtype = dtype_of(hidden, "hidden");
    compute = compute_scalar_type(dtype);
    check_dim(hidden, 3, "hidden", "[B, T, H]");
    check_dim(weight, 2, "weight", "[V, H]");
    B = hidden.size(0), T = hidden.size(1), V = weight.size(0), H = weight.size(1);
    check_shape(hidden, {B, T, H}, "hidden");
    part = part_.value_or(VocabPart{0, V});
    part.check(V);
    device.check(weight, "weight");
    check_dtype(weight, hidden.scalar_type(), "weight");
    if (bias.has_value()) {
      device.check(*bias, "bias");
      check_shape(*bias, {V}, "bias");
      check_dtype(*bias, hidden.scalar_type(), "bias");
    }
    targets = make_targets(device, labels, scoring.ignore_index, scoring.shift);
    check_shape(labels, {B, T}, "labels");
  }

  // R: an upper bound of the number of valid tokens. num_valid_tokens is -1 if it is not given.
  int64_t rows_for(int64_t num_valid_tokens, int64_t logits_budget_bytes) const {
    STD_TORCH_CHECK(num_valid_tokens >= -1, "num_valid_tokens: expected -1 or more, got ",
                    num_valid_tokens);
    STD_TORCH_CHECK(logits_budget_bytes >= 0, "logits_budget_bytes: expected 0 or more, got ",
                    logits_budget_bytes);
    return num_valid_tokens >= 0 ? num_valid_tokens : B * T;
  }
};

// A chunk of the vocabulary: columns [begin, begin + length) of the logits.
struct Columns {
  int64_t begin, length;

  Columns(const Problem& problem, int64_t width, int64_t chunk)
      : begin(chunk * width), length(std::min(width, problem.V - chunk * width)) {}

  // The first count rows of this chunk's logits: [R, width] -> [count, length].
  Tensor of(Tensor logits, int64_t count) const {
    Tensor rows = torch::stable::narrow(logits, 0, 0, count);
    return torch::stable::narrow(rows, 1, 0, length);
  }

  // [V, ...] -> [length, ...]
  Tensor of_labels(Tensor tensor) const { return torch::stable::narrow(tensor, 0, begin, length); }
};

// logits [count, length] = hidden_rows weight[columns]^T + bias[columns]
inline void multiply_logits(const Problem& problem, const Tensor& logits, const Tensor& hidden_rows,
                            const Columns& columns) {
  const Tensor weight_rows = columns.of_labels(problem.weight);
  if (problem.bias.has_value()) {
    linear_into(logits, hidden_rows, weight_rows, columns.of_labels(*problem.bias));
  } else {
    multiply_into(logits, hidden_rows, transposed(weight_rows));
  }
}

}  // namespace simpo_ext::ops
