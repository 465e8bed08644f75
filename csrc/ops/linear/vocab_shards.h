// The ops from hidden states for a sharded vocabulary: see ops/vocab_shards.h.
//
//   linear_token_logps_shard           hidden, weight of the shard -> stats [3, R], kept_logits
//   linear_token_logps_merge           stats of all shards, in order -> logps, max, sum_exp
//   linear_token_logps_shard_backward  -> the shard's term of dhidden [R, H], unrounded; the caller
//                                      adds up the terms of all shards; dweight, dbias of the shard
//   linear_token_logps_dhidden         that sum -> dhidden [B, T, H], rounded once
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/linear/backward.h"
#include "ops/linear/forward.h"
#include "ops/linear/plan.h"
#include "ops/linear/problem.h"
#include "ops/linear/rows.h"
#include "ops/tensors.h"
#include "ops/vocab_shards.h"

namespace simpo_ext::ops {

template <class Device>
std::tuple<Tensor, Tensor> linear_token_logps_shard(
    const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& labels,
    int64_t first_label, int64_t num_labels, int64_t ignore_index, bool shift, double logit_scale,
    double softcap, int64_t logits_budget_bytes, int64_t num_valid_tokens) {
  const Device device(hidden, "hidden");
  const Scoring scoring{ignore_index, shift, {logit_scale, softcap}};
  const Problem problem(device, hidden, weight, bias, labels, scoring,
                        VocabPart{first_label, num_labels});
  const int64_t R = problem.rows_for(num_valid_tokens, logits_budget_bytes);
  const LogitsPlan plan(R, problem.V, hidden.element_size(), logits_budget_bytes,
                        Device::kChunkColumns);
  const Tensor kept = device.new_large_for_writing(hidden, {plan.kept, R, plan.width});
  const ShardStats stats(hidden, new_empty(hidden, {3, R}, ScalarType::Double), R, problem.compute);
  const Rows rows(device, problem, R, nullptr);
  fold_logits(device, problem, plan, rows, hidden, kept, scoring.transform,
              {stats.max(), stats.sum_exp(), stats.label_z()});
  return {stats.finish(), kept};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_token_logps_merge(const Tensor& shards,
                                                            const Tensor& labels,
                                                            int64_t ignore_index, bool shift,
                                                            bool float64) {
  const Device device(shards, "shards");
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  check_dim(shards, 3, "shards", "[K, 3, R]");
  check_shape(shards, {shards.size(0), 3, shards.size(2)}, "shards");
  check_dtype(shards, ScalarType::Double, "shards");
  const Tensor stats = as_contiguous(shards);
  const DType dtype = merged_dtype(float64);
  const int64_t R = shards.size(2);
  Tensor logps = new_empty(shards, {targets.B, targets.T}, compute_scalar_type(dtype));
  Tensor max = new_empty(shards, {R}, compute_scalar_type(dtype));
  Tensor sum_exp = new_empty(shards, {R});
  const Rows rows(device, shards, targets, dtype, R, logps.mutable_data_ptr());
  device.merge_shards({
      .dtype = dtype,
      .targets = rows.targets(),
      .K = shards.size(0),
      .shards = stats.template const_data_ptr<double>(),
      .positions = rows.positions.template const_data_ptr<int64_t>(),
      .logps = logps.mutable_data_ptr(),
      .max = max.mutable_data_ptr(),
      .sum_exp = sum_exp.mutable_data_ptr<double>(),
  });
  return {logps, max, sum_exp};
}

// dhidden_rows [R, H] compute, dweight, dbias. Gradients that are not needed are [0].
template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_token_logps_shard_backward(
    const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight,
    std::optional<Tensor> bias, const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
    const Tensor& kept_logits, int64_t first_label, int64_t num_labels, int64_t ignore_index,
    bool shift, double logit_scale, double softcap, bool needs_hidden, bool needs_weight,
    bool needs_bias) {
  const Device device(hidden, "hidden");
  const Scoring scoring{ignore_index, shift, {logit_scale, softcap}};
  const Problem problem(device, hidden, weight, bias, labels, scoring,
                        VocabPart{first_label, num_labels});
  const LinearGradients gradients =
      multiply_gradients(device, problem, grad_logps, hidden, max, sum_exp, kept_logits,
                         scoring.transform, {needs_hidden, needs_weight, needs_bias}, true);
  if (needs_hidden) {
    // The caller adds up all R rows over the shards, so rows that no product wrote must be zeros.
    const int64_t R = gradients.rows.R;
    const int64_t written = problem.V > 0 ? gradients.rows.count : 0;
    if (written < R) {
      Tensor sum = gradients.sum;
      Tensor others = torch::stable::narrow(sum, 0, written, R - written);
      torch::stable::zero_(others);
    }
    add_label_shares(device, problem, gradients, first_label);
  }
  return {gradients.sum, gradients.dweight, gradients.dbias};
}

template <class Device>
Tensor linear_token_logps_dhidden(const Tensor& dhidden_rows, const Tensor& hidden,
                                  const Tensor& labels, int64_t ignore_index, bool shift) {
  const Device device(hidden, "hidden");
  const DType dtype = dtype_of(hidden, "hidden");
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  check_dim(hidden, 3, "hidden", "[B, T, H]");
  const int64_t H = hidden.size(2);
  check_shape(hidden, {targets.B, targets.T, H}, "hidden");
  device.check(dhidden_rows, "dhidden_rows");
  check_dim(dhidden_rows, 2, "dhidden_rows", "[R, H]");
  check_shape(dhidden_rows, {dhidden_rows.size(0), H}, "dhidden_rows");
  check_dtype(dhidden_rows, compute_scalar_type(dtype), "dhidden_rows");
  const Tensor from = as_contiguous(dhidden_rows);
  const Rows rows(device, hidden, targets, dtype, from.size(0), nullptr);
  Tensor to = device.new_large_for_writing(hidden, {targets.B, targets.T, H});
  torch::stable::zero_(to);
  rows.scatter(device, dtype, from, to);
  return to;
}

}  // namespace simpo_ext::ops
