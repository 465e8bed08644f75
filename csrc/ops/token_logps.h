// The ops from logits [B, T, V] to token log-probs, and their backward.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

// ---- logits ---------------------------------------------------------------------------------

struct LogitsShape {
  DType dtype;
  int64_t B, T, V;
};

inline LogitsShape check_logits(const Tensor& logits, const Tensor& labels) {
  check_dim(logits, 3, "logits", "[B, T, V]");
  const LogitsShape shape{dtype_of(logits, "logits"), logits.size(0), logits.size(1),
                          logits.size(2)};
  check_shape(labels, {shape.B, shape.T}, "labels");
  return shape;
}

inline bool has_unit_stride_in_vocabulary(const Tensor& logits) {
  return logits.size(2) <= 1 || logits.stride(2) == 1;
}

inline Tensor with_unit_stride(const Tensor& logits) {
  return has_unit_stride_in_vocabulary(logits) ? logits : as_contiguous(logits);
}

// False if two rows may share memory. Such rows cannot both be overwritten.
inline bool has_distinct_rows(const Tensor& logits) {
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  const int64_t stride_b = logits.stride(0), stride_t = logits.stride(1);
  if (B * T * V == 0) return true;
  const bool time_apart = T == 1 || stride_t >= V;
  const bool batch_apart = B == 1 || stride_b >= V;
  const bool nested =
      B == 1 || T == 1 || stride_b >= (T - 1) * stride_t + V || stride_t >= (B - 1) * stride_b + V;
  return time_apart && batch_apart && nested;
}

inline void check_overwritable(const Tensor& logits, const Tensor& labels) {
  check_logits(logits, labels);
  STD_TORCH_CHECK(has_unit_stride_in_vocabulary(logits) && has_distinct_rows(logits),
                  "logits: expected stride 1 in the vocabulary and rows apart in memory, got "
                  "strides [",
                  logits.stride(0), ", ", logits.stride(1), ", ", logits.stride(2), "] for shape ",
                  shape_text(logits));
}

inline VocabPart all_labels_of(const Tensor& logits) { return {0, logits.size(2)}; }

// ---- forward --------------------------------------------------------------------------------

// Where the kernels write the report of each row.
struct TokenReport {
  double* mean_logit;  // [B, T]
  double* entropy;     // [B, T]
  bool all_positions;
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> score_logits(const Device& device, const Tensor& logits,
                                                const Tensor& labels, const Scoring& scoring,
                                                const std::optional<TokenReport>& report) {
  const LogitsShape shape = check_logits(logits, labels);
  const Targets targets = make_targets(device, labels, scoring.ignore_index, scoring.shift);
  const Tensor rows = with_unit_stride(logits);
  const ScalarType compute = compute_scalar_type(shape.dtype);
  Tensor logps = new_empty(logits, {shape.B, shape.T}, compute);
  Tensor max = new_empty(logits, {shape.B, shape.T}, compute);
  Tensor sum_exp = new_empty(logits, {shape.B, shape.T}, ScalarType::Double);
  const int64_t N = shape.B * shape.T;
  const int64_t num_segments = report ? 0 : device.shared_segments(shape.dtype, N, shape.V);
  std::optional<Tensor> segments;
  if (num_segments > 0) segments = new_empty(logits, {num_segments, 3, N}, ScalarType::Double);
  device.token_logps({
      .dtype = shape.dtype,
      .V = shape.V,
      .logits = rows.const_data_ptr(),
      .logits_strides = token_strides(rows),
      .targets = targets,
      .transform = scoring.transform,
      .logps = logps.mutable_data_ptr(),
      .max = max.mutable_data_ptr(),
      .sum_exp = sum_exp.mutable_data_ptr<double>(),
      .mean_logit = report ? report->mean_logit : nullptr,
      .entropy = report ? report->entropy : nullptr,
      .all_positions = report && report->all_positions,
      .segments = segments ? segments->mutable_data_ptr<double>() : nullptr,
  });
  return {logps, max, sum_exp};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_logps(const Tensor& logits, const Tensor& labels,
                                               int64_t ignore_index, bool shift, double logit_scale,
                                               double softcap) {
  const Device device(logits, "logits");
  return score_logits(device, logits, labels, {ignore_index, shift, {logit_scale, softcap}},
                      std::nullopt);
}

// Also returns mean_logit and entropy.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_logps_report(
    const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool shift,
    double logit_scale, double softcap, bool all_positions) {
  const Device device(logits, "logits");
  const LogitsShape shape = check_logits(logits, labels);
  Tensor mean_logit = new_empty(logits, {shape.B, shape.T}, ScalarType::Double);
  Tensor entropy = new_empty(logits, {shape.B, shape.T}, ScalarType::Double);
  const auto [logps, max, sum_exp] =
      score_logits(device, logits, labels, {ignore_index, shift, {logit_scale, softcap}},
                   TokenReport{mean_logit.mutable_data_ptr<double>(),
                               entropy.mutable_data_ptr<double>(), all_positions});
  return {logps, max, sum_exp, mean_logit, entropy};
}

// ---- backward -------------------------------------------------------------------------------

// dlogits may be logits itself.
template <class Device>
void write_logits_gradient(const Device& device, const LargeTensor& dlogits,
                           const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                           const Tensor& max, const Tensor& sum_exp, const VocabPart& part,
                           const Scoring& scoring) {
  const LogitsShape shape = check_logits(logits, labels);
  const Targets targets = make_targets(device, labels, scoring.ignore_index, scoring.shift);
  const auto check_row_values = [&](const Tensor& tensor, ScalarType dtype, const char* name) {
    device.check(tensor, name);
    check_shape(tensor, {shape.B, shape.T}, name);
    check_dtype(tensor, dtype, name);
  };
  const ScalarType compute = compute_scalar_type(shape.dtype);
  check_row_values(grad_logps, compute, "grad_logps");
  check_row_values(max, compute, "max");
  check_row_values(sum_exp, ScalarType::Double, "sum_exp");
  const Tensor saved_max = as_contiguous(max);
  const Tensor saved_sum_exp = as_contiguous(sum_exp);
  device.token_logps_backward({
      .dtype = shape.dtype,
      .V = shape.V,
      .logits = logits.const_data_ptr(),
      .logits_strides = token_strides(logits),
      .targets = targets,
      .transform = scoring.transform,
      .grad_logps = grad_logps.const_data_ptr(),
      .grad_strides = token_strides(grad_logps),
      .max = saved_max.const_data_ptr(),
      .sum_exp = saved_sum_exp.template const_data_ptr<double>(),
      .dlogits = dlogits.tensor.mutable_data_ptr(),
      .dlogits_strides = token_strides(dlogits.tensor),
      .dlogits_holds_zeros = dlogits.holds_zeros,
      .first_label = part.first_label,
      .num_labels = part.num_labels,
  });
}

template <class Device>
Tensor new_logits_gradient(const Device& device, const Tensor& grad_logps, const Tensor& logits,
                           const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
                           const VocabPart& part, const Scoring& scoring) {
  const Tensor rows = with_unit_stride(logits);
  const LargeTensor dlogits =
      device.new_large(logits, {logits.size(0), logits.size(1), logits.size(2)});
  write_logits_gradient(device, dlogits, grad_logps, rows, labels, max, sum_exp, part, scoring);
  return dlogits.tensor;
}

template <class Device>
Tensor token_logps_backward(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                            const Tensor& max, const Tensor& sum_exp, int64_t ignore_index,
                            bool shift, double logit_scale, double softcap) {
  const Device device(logits, "logits");
  check_logits(logits, labels);
  return new_logits_gradient(device, grad_logps, logits, labels, max, sum_exp,
                             all_labels_of(logits), {ignore_index, shift, {logit_scale, softcap}});
}

template <class Device>
void token_logps_backward_inplace(const Tensor& grad_logps, const Tensor& logits,
                                  const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
                                  int64_t ignore_index, bool shift, double logit_scale,
                                  double softcap) {
  const Device device(logits, "logits");
  check_overwritable(logits, labels);
  write_logits_gradient(device, {logits, false}, grad_logps, logits, labels, max, sum_exp,
                        all_labels_of(logits), {ignore_index, shift, {logit_scale, softcap}});
}

}  // namespace simpo_ext::ops
