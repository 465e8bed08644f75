// The ops from logits for a sharded vocabulary. linear/vocab_shards.h has those from hidden states.
// No op communicates: the caller gathers and adds up between the ops.
//
//   token_logps_shard           logits of the shard -> stats [3, B, T]
//   token_logps_merge           stats of all shards, in order -> logps, max, sum_exp
//   token_logps_shard_backward  max and sum_exp of the whole vocabulary -> the shard's dlogits
//
// stats are float64, which holds all values exactly. For each row they have the largest z,
// sum(exp(z - max)), and the label's z, which is NaN if the label is on another shard. All three
// are 0 at masked rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/tensors.h"
#include "ops/token_logps.h"

namespace simpo_ext::ops {

// stats [3, ...] float64, for kernels that write max and label_z in the compute dtype.
class ShardStats {
 public:
  // rows: the number of rows in stats
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

  // Returns the stats. Call it after the kernels are enqueued.
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

template <class Device>
Tensor token_logps_shard(const Tensor& logits, const Tensor& labels, int64_t first_label,
                         int64_t num_labels, int64_t ignore_index, bool shift, double logit_scale,
                         double softcap) {
  const Device device(logits, "logits");
  const LogitsShape shape = check_logits(logits, labels);
  const VocabPart part{first_label, num_labels};
  part.check(shape.V);
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  const Tensor rows = with_unit_stride(logits);
  const ShardStats stats(logits, new_empty(logits, {3, shape.B, shape.T}, ScalarType::Double),
                         shape.B * shape.T, compute_scalar_type(shape.dtype));
  device.token_logps({
      .dtype = shape.dtype,
      .V = shape.V,
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

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_logps_merge(const Tensor& shards, const Tensor& labels,
                                                     int64_t ignore_index, bool shift,
                                                     bool float64) {
  const Device device(shards, "shards");
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  check_dim(shards, 4, "shards", "[K, 3, B, T]");
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

template <class Device>
Tensor token_logps_shard_backward(const Tensor& grad_logps, const Tensor& logits,
                                  const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
                                  int64_t first_label, int64_t num_labels, int64_t ignore_index,
                                  bool shift, double logit_scale, double softcap) {
  const Device device(logits, "logits");
  const VocabPart part{first_label, num_labels};
  part.check(check_logits(logits, labels).V);
  return new_logits_gradient(device, grad_logps, logits, labels, max, sum_exp, part,
                             {ignore_index, shift, {logit_scale, softcap}});
}

template <class Device>
void token_logps_shard_backward_inplace(const Tensor& grad_logps, const Tensor& logits,
                                        const Tensor& labels, const Tensor& max,
                                        const Tensor& sum_exp, int64_t first_label,
                                        int64_t num_labels, int64_t ignore_index, bool shift,
                                        double logit_scale, double softcap) {
  const Device device(logits, "logits");
  check_overwritable(logits, labels);
  const VocabPart part{first_label, num_labels};
  part.check(logits.size(2));
  write_logits_gradient(device, {logits, false}, grad_logps, logits, labels, max, sum_exp, part,
                        {ignore_index, shift, {logit_scale, softcap}});
}

}  // namespace simpo_ext::ops
