// The ops between token log-probs and sequences: the targets of the flat layout, and sequence
// log-probs.
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

inline DType check_token_logps(const Tensor& token_logps, const Tensor& labels) {
  check_dim(token_logps, 2, "token_logps", "[B, T]");
  check_shape(labels, {token_logps.size(0), token_logps.size(1)}, "labels");
  return compute_dtype_of(token_logps, "token_logps");
}

// counts [S] that a forward returned.
template <class Device>
Tensor check_counts(const Device& device, const Tensor& counts, int64_t S) {
  device.check(counts, "counts");
  check_shape(counts, {S}, "counts");
  check_dtype(counts, ScalarType::Long, "counts");
  return as_contiguous(counts);
}

template <class Device>
Tensor sequence_targets(const Tensor& labels, const Tensor& cu_seqlens, int64_t num_labels,
                        int64_t ignore_index, bool shift) {
  const Device device(labels, "labels");
  // Layout requires targets without a shift. The kernel applies the shift.
  Targets given = make_targets(device, labels, ignore_index, false);
  const Layout layout(device, given, cu_seqlens);
  given.shift = shift;
  Tensor targets = new_empty(labels, {given.B, given.T});
  device.sequence_targets({
      .labels = given,
      .num_labels = num_labels,
      .sequences = layout.sequences(),
      .targets = targets.mutable_data_ptr<int64_t>(),
  });
  return targets;
}

template <class Device>
std::tuple<Tensor, Tensor> sequence_logps(const Tensor& token_logps, const Tensor& labels,
                                          std::optional<Tensor> cu_seqlens, int64_t ignore_index,
                                          bool shift, bool average_log_prob) {
  const Device device(token_logps, "token_logps");
  const DType dtype = check_token_logps(token_logps, labels);
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  const Layout layout(device, targets, cu_seqlens);
  Tensor logps = new_empty(token_logps, {layout.S()});
  Tensor counts = new_empty(token_logps, {layout.S()}, ScalarType::Long);
  device.sequence_logps({
      .dtype = dtype,
      .token_logps = token_logps.const_data_ptr(),
      .token_strides = token_strides(token_logps),
      .targets = targets,
      .sequences = layout.sequences(),
      .average = average_log_prob,
      .logps = logps.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int64_t>(),
  });
  return {logps, counts};
}

template <class Device>
Tensor sequence_logps_backward(const Tensor& grad_logps, const Tensor& labels,
                               std::optional<Tensor> cu_seqlens, const Tensor& counts,
                               int64_t ignore_index, bool shift, bool average_log_prob) {
  const Device device(labels, "labels");
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  const Layout layout(device, targets, cu_seqlens);
  device.check(grad_logps, "grad_logps");
  check_shape(grad_logps, {layout.S()}, "grad_logps");
  const DType dtype = compute_dtype_of(grad_logps, "grad_logps");
  const Tensor saved_counts = check_counts(device, counts, layout.S());
  Tensor grad_token_logps = layout.new_gradient(grad_logps, targets);
  device.sequence_logps_backward({
      .dtype = dtype,
      .targets = targets,
      .sequences = layout.sequences(),
      .average = average_log_prob,
      .grad_logps = grad_logps.const_data_ptr(),
      .grad_stride = grad_logps.stride(0),
      .counts = saved_counts.template const_data_ptr<int64_t>(),
      .grad_token_logps = grad_token_logps.mutable_data_ptr(),
  });
  return grad_token_logps;
}

}  // namespace simpo_ext::ops
