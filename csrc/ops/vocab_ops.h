// The ops of a vocabulary in shards, on any device: what a shard says of each row, what all of them
// come to, and each shard's gradients. Between the ops the caller gathers and adds up, however it
// likes; nothing here communicates.
//
//   token_logps_shard          logits of the shard -> stats [3, B, T]
//   token_logps_merge          stats of all shards, in order -> logps, max, sum_exp
//   token_logps_shard_backward max and sum_exp of the whole -> the shard's dlogits
//
// and, with the R rows of linear_ops.h,
//
//   linear_token_logps_shard           hidden, weight of the shard -> stats [3, R], kept_logits
//   linear_token_logps_merge           stats of all shards, in order -> logps, max, sum_exp
//   linear_token_logps_shard_backward  -> the shard's share of dhidden [R, H], unrounded, to be
//                                      added up over shards; dweight and dbias of the shard
//   linear_token_logps_dhidden         that sum -> dhidden [B, T, H], rounded once
//
// stats are float64, which holds everything exactly: of each row the largest z, sum(exp(z - max)),
// and the label's z, NaN where it is on another shard; zeros at masked rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/linear_ops.h"
#include "ops/ops.h"

namespace simpo_ext::ops {

// stats [3, ...] float64, of which a kernel writes max and label_z in the compute dtype.
class ShardStats {
 public:
  // As many rows as a tensor [...] of the sizes has elements.
  ShardStats(const Tensor& like, const Tensor& stats, int64_t rows, ScalarType compute)
      : stats_(stats), max_(row(0)), label_z_(row(2)) {
    if (compute == ScalarType::Double) return;
    is_converted_ = true;
    max_ = new_empty(like, {rows}, compute);
    label_z_ = new_empty(like, {rows}, compute);
  }

  void* max() const { return max_.mutable_data_ptr(); }
  double* sum_exp() const { return row(1).template mutable_data_ptr<double>(); }
  void* label_z() const { return label_z_.mutable_data_ptr(); }

  // Once the kernels are enqueued.
  Tensor finish() const {
    if (is_converted_) {
      convert(max_, 0);
      convert(label_z_, 2);
    }
    return stats_;
  }

 private:
  Tensor row(int64_t i) const { return torch::stable::select(stats_, 0, i); }

  void convert(const Tensor& from, int64_t i) const {
    Tensor flat = torch::stable::view(row(i), {from.size(0)});
    torch::stable::copy_(flat, from);
  }

  Tensor stats_, max_, label_z_;
  bool is_converted_ = false;
};

inline DType merged_dtype(bool float64) { return float64 ? DType::kFloat64 : DType::kFloat32; }

// ---- from logits ----------------------------------------------------------------------------

template <class Device>
class LogitsShardOps : Ops<Device> {
  using Base = Ops<Device>;

 public:
  static Tensor shard(const Tensor& logits, const Tensor& labels, int64_t first_label,
                      int64_t num_labels, int64_t ignore_index, bool shift, double logit_scale,
                      double softcap) {
    const Device device(logits, "logits");
    const auto checked = Base::check_logits(logits, labels);
    const VocabPart part{first_label, num_labels};
    part.check(checked.V);
    const Targets targets = make_targets(device, labels, ignore_index, shift);
    const Tensor rows = Base::with_unit_stride(logits);
    const ShardStats stats(logits, new_empty(logits, {3, checked.B, checked.T}, ScalarType::Double),
                           checked.B * checked.T, compute_scalar_type(checked.dtype));
    device.token_logps({
        .dtype = checked.dtype,
        .V = checked.V,
        .logits = rows.const_data_ptr(),
        .logits_strides = token_strides(rows),
        .targets = targets,
        .transform = {logit_scale, softcap},
        .logps = nullptr,
        .max = stats.max(),
        .sum_exp = stats.sum_exp(),
        .first_label = part.first_label,
        .num_labels = part.num_labels,
        .label_z = stats.label_z(),
    });
    return stats.finish();
  }

  static std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& shards, const Tensor& labels,
                                                  int64_t ignore_index, bool shift, bool float64) {
    const Device device(shards, "shards");
    const Targets targets = make_targets(device, labels, ignore_index, shift);
    STD_TORCH_CHECK(shards.dim() == 4, "shards: expected shape [K, 3, B, T], got ",
                    shape_text(shards));
    check_shape(shards, {shards.size(0), 3, targets.B, targets.T}, "shards");
    check_dtype(shards, ScalarType::Double, "shards");
    const Tensor stats = as_contiguous(shards);
    const DType dtype = merged_dtype(float64);
    Tensor logps = new_empty(shards, {targets.B, targets.T}, compute_scalar_type(dtype));
    Tensor max = new_empty(shards, {targets.B, targets.T}, compute_scalar_type(dtype));
    Tensor sum_exp = new_empty(shards, {targets.B, targets.T});
    device.merge_shards({
        .dtype = dtype,
        .targets = targets,
        .K = shards.size(0),
        .shards = stats.template const_data_ptr<double>(),
        .positions = nullptr,
        .logps = logps.mutable_data_ptr(),
        .max = max.mutable_data_ptr(),
        .sum_exp = sum_exp.mutable_data_ptr<double>(),
    });
    return {logps, max, sum_exp};
  }

  static Tensor backward(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                         const Tensor& max, const Tensor& sum_exp, int64_t first_label,
                         int64_t num_labels, int64_t ignore_index, bool shift, double logit_scale,
                         double softcap) {
    const Device device(logits, "logits");
    const auto checked = Base::check_logits(logits, labels);
    const VocabPart part{first_label, num_labels};
    part.check(checked.V);
    const Tensor rows = Base::with_unit_stride(logits);
    const LargeTensor dlogits = device.new_large(logits, {checked.B, checked.T, checked.V});
    Base::token_logps_backward_into(device, dlogits, grad_logps, rows, labels, max, sum_exp, part,
                                    ignore_index, shift, logit_scale, softcap);
    return dlogits.tensor;
  }

  static void backward_inplace(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                               const Tensor& max, const Tensor& sum_exp, int64_t first_label,
                               int64_t num_labels, int64_t ignore_index, bool shift,
                               double logit_scale, double softcap) {
    const Device device(logits, "logits");
    Base::check_overwritable(logits, labels);
    const VocabPart part{first_label, num_labels};
    part.check(logits.size(2));
    Base::token_logps_backward_into(device, {logits, false}, grad_logps, logits, labels, max,
                                    sum_exp, part, ignore_index, shift, logit_scale, softcap);
  }
};

// ---- from hidden states ---------------------------------------------------------------------

template <class Device>
class LinearShardOps : LinearOps<Device> {
  using Base = LinearOps<Device>;

 public:
  static std::tuple<Tensor, Tensor> shard(const Tensor& hidden, const Tensor& weight,
                                          std::optional<Tensor> bias, const Tensor& labels,
                                          int64_t first_label, int64_t num_labels,
                                          int64_t ignore_index, bool shift, double logit_scale,
                                          double softcap, int64_t logits_budget_bytes,
                                          int64_t num_valid_tokens) {
    const Device device(hidden, "hidden");
    const typename Base::Problem problem(device, hidden, weight, bias, labels, ignore_index, shift,
                                         VocabPart{first_label, num_labels});
    const int64_t R = problem.rows_for(num_valid_tokens, logits_budget_bytes);
    const LogitsPlan plan(R, problem.V, hidden.element_size(), logits_budget_bytes,
                          Device::kChunkColumns);
    const Tensor kept = device.new_large_for_writing(hidden, {plan.kept, R, plan.width});
    const ShardStats stats(hidden, new_empty(hidden, {3, R}, ScalarType::Double), R,
                           problem.compute);
    const typename Base::Rows rows(device, problem, R, nullptr);
    Base::fold_logits(device, problem, plan, rows, hidden, kept, {logit_scale, softcap},
                      stats.max(), stats.sum_exp(), stats.label_z());
    return {stats.finish(), kept};
  }

  static std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& shards, const Tensor& labels,
                                                  int64_t ignore_index, bool shift, bool float64) {
    const Device device(shards, "shards");
    const Targets targets = make_targets(device, labels, ignore_index, shift);
    STD_TORCH_CHECK(shards.dim() == 3, "shards: expected shape [K, 3, R], got ",
                    shape_text(shards));
    check_shape(shards, {shards.size(0), 3, shards.size(2)}, "shards");
    check_dtype(shards, ScalarType::Double, "shards");
    const Tensor stats = as_contiguous(shards);
    const DType dtype = merged_dtype(float64);
    const int64_t R = shards.size(2);
    Tensor logps = new_empty(shards, {targets.B, targets.T}, compute_scalar_type(dtype));
    Tensor max = new_empty(shards, {R}, compute_scalar_type(dtype));
    Tensor sum_exp = new_empty(shards, {R});
    const typename Base::Rows rows(device, shards, targets, dtype, R, logps.mutable_data_ptr());
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

  // Of hidden (its rows, compute), weight and bias; [0] where it was not asked for.
  static std::tuple<Tensor, Tensor, Tensor> backward(
      const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight,
      std::optional<Tensor> bias, const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
      const Tensor& kept_logits, int64_t first_label, int64_t num_labels, int64_t ignore_index,
      bool shift, double logit_scale, double softcap, bool needs_hidden, bool needs_weight,
      bool needs_bias) {
    const Device device(hidden, "hidden");
    const typename Base::Problem problem(device, hidden, weight, bias, labels, ignore_index, shift,
                                         VocabPart{first_label, num_labels});
    const auto gradients = Base::multiply_gradients(device, problem, grad_logps, hidden, max,
                                                    sum_exp, kept_logits, {logit_scale, softcap},
                                                    {needs_hidden, needs_weight, needs_bias}, true);
    if (needs_hidden) {
      const auto& rows = gradients.rows;
      // What no product has written, other shards are still to be added to.
      const int64_t written = problem.V > 0 ? rows.count : 0;
      if (written < rows.R) {
        Tensor sum = gradients.sum;
        Tensor others = torch::stable::narrow(sum, 0, written, rows.R - written);
        torch::stable::zero_(others);
      }
      Base::add_label_shares(device, problem, gradients, first_label);
    }
    return {gradients.sum, gradients.dweight, gradients.dbias};
  }

  static Tensor dhidden(const Tensor& dhidden_rows, const Tensor& hidden, const Tensor& labels,
                        int64_t ignore_index, bool shift) {
    const Device device(hidden, "hidden");
    const DType dtype = dtype_of(hidden, "hidden");
    const Targets targets = make_targets(device, labels, ignore_index, shift);
    STD_TORCH_CHECK(hidden.dim() == 3, "hidden: expected shape [B, T, H], got ",
                    shape_text(hidden));
    const int64_t H = hidden.size(2);
    check_shape(hidden, {targets.B, targets.T, H}, "hidden");
    device.check(dhidden_rows, "dhidden_rows");
    STD_TORCH_CHECK(dhidden_rows.dim() == 2, "dhidden_rows: expected shape [R, H], got ",
                    shape_text(dhidden_rows));
    check_shape(dhidden_rows, {dhidden_rows.size(0), H}, "dhidden_rows");
    check_dtype(dhidden_rows, compute_scalar_type(dtype), "dhidden_rows");
    const Tensor from = as_contiguous(dhidden_rows);
    const typename Base::Rows rows(device, hidden, targets, dtype, from.size(0), nullptr);
    Tensor to = device.new_large_for_writing(hidden, {targets.B, targets.T, H});
    torch::stable::zero_(to);
    Base::scatter_rows(device, dtype, rows, from, to);
    return to;
  }
};

template <class Device>
void register_vocab_ops(torch::stable::detail::StableLibrary& m) {
  using Logits = LogitsShardOps<Device>;
  m.impl("token_logps_shard", TORCH_BOX(&Logits::shard));
  m.impl("token_logps_merge", TORCH_BOX(&Logits::merge));
  m.impl("token_logps_shard_backward", TORCH_BOX(&Logits::backward));
  m.impl("token_logps_shard_backward_", TORCH_BOX(&Logits::backward_inplace));
  using Linear = LinearShardOps<Device>;
  m.impl("linear_token_logps_shard", TORCH_BOX(&Linear::shard));
  m.impl("linear_token_logps_merge", TORCH_BOX(&Linear::merge));
  m.impl("linear_token_logps_shard_backward", TORCH_BOX(&Linear::backward));
  m.impl("linear_token_logps_dhidden", TORCH_BOX(&Linear::dhidden));
}

}  // namespace simpo_ext::ops
