// The op from token log-probs to the preference loss, and its backward.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/sequences.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

inline LossReduction make_reduction(double sft_weight, int64_t sft_reduction, int64_t reduction,
                                    int64_t empty) {
  STD_TORCH_CHECK(sft_reduction == 0 || sft_reduction == 1, "sft_reduction: expected 0 or 1, got ",
                  sft_reduction);
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2, got ",
                  reduction);
  STD_TORCH_CHECK(empty == 0 || empty == 1, "empty: expected 0 or 1, got ", empty);
  return {
      .reduction = static_cast<Reduction>(reduction),
      .sft_reduction = static_cast<SftReduction>(sft_reduction),
      .empty = static_cast<EmptyPolicy>(empty),
      .sft_weight = sft_weight,
  };
}

// loss, losses, logps, rewards, sft_loss, metrics, slopes, counts
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss(
    const Tensor& token_logps, const Tensor& labels, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> pairs, std::optional<Tensor> pair_weight, int64_t ignore_index,
    bool shift, bool average_log_prob, double beta, double gamma_beta_ratio, int64_t loss_type,
    double label_smoothing, double alpha, double sft_weight, int64_t sft_reduction,
    int64_t reduction, int64_t empty) {
  const Device device(token_logps, "token_logps");
  const DType dtype = check_token_logps(token_logps, labels);
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  const Layout layout(device, targets, cu_seqlens, pairs, pair_weight);
  STD_TORCH_CHECK(loss_type >= 0 && loss_type <= 2, "loss_type: expected 0, 1 or 2, got ",
                  loss_type);
  const LossReduction how = make_reduction(sft_weight, sft_reduction, reduction, empty);
  const int64_t S = layout.S(), P = layout.P();
  const auto new_reduced = [&] {
    return how.reduction == Reduction::kNone ? new_empty(token_logps, {P})
                                             : new_empty(token_logps, {});
  };
  Tensor loss = new_reduced(), losses = new_empty(token_logps, {P});
  Tensor logps = new_empty(token_logps, {2 * P}), rewards = new_empty(token_logps, {2 * P});
  Tensor sft_loss = new_reduced();
  Tensor metrics = new_empty(token_logps, {kNumMetrics}, ScalarType::Double);
  Tensor slopes = new_empty(token_logps, {2 * P});
  Tensor counts = new_empty(token_logps, {S}, ScalarType::Long);
  Tensor sums = new_empty(token_logps, {S}, ScalarType::Double);
  device.preference_loss({
      .dtype = dtype,
      .token_logps = token_logps.const_data_ptr(),
      .token_strides = token_strides(token_logps),
      .targets = targets,
      .sequences = layout.sequences(),
      .pairs = layout.pairs(),
      .average = average_log_prob,
      .pair_loss = {static_cast<LossType>(loss_type), beta, gamma_beta_ratio, label_smoothing,
                    alpha},
      .reduction = how,
      .sums = sums.mutable_data_ptr<double>(),
      .loss = loss.mutable_data_ptr(),
      .losses = losses.mutable_data_ptr(),
      .logps = logps.mutable_data_ptr(),
      .rewards = rewards.mutable_data_ptr(),
      .sft_loss = sft_loss.mutable_data_ptr(),
      .metrics = metrics.mutable_data_ptr<double>(),
      .slopes = slopes.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int64_t>(),
  });
  return {loss, losses, logps, rewards, sft_loss, metrics, slopes, counts};
}

// The gradient of one output of preference_loss. A missing gradient counts as zero. A scalar has
// stride 0, so that every pair reads it.
struct OutputGradient {
  const void* data = nullptr;
  int64_t stride = 0;

  template <class Device>
  static OutputGradient check(const Device& device, const std::optional<Tensor>& gradient,
                              const Tensor& like, std::initializer_list<int64_t> sizes,
                              const char* name) {
    if (!gradient.has_value()) return {};
    device.check(*gradient, name);
    check_dtype(*gradient, like.scalar_type(), name);
    check_shape(*gradient, sizes, name);
    return {gradient->const_data_ptr(), sizes.size() == 0 ? 0 : gradient->stride(0)};
  }
};

template <class Device>
Tensor preference_loss_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_losses,
                                std::optional<Tensor> grad_logps,
                                std::optional<Tensor> grad_sft_loss, const Tensor& labels,
                                std::optional<Tensor> cu_seqlens, std::optional<Tensor> pairs,
                                std::optional<Tensor> pair_weight, const Tensor& slopes,
                                const Tensor& counts, int64_t ignore_index, bool shift,
                                bool average_log_prob, double sft_weight, int64_t sft_reduction,
                                int64_t reduction, int64_t empty) {
  const Device device(labels, "labels");
  const Targets targets = make_targets(device, labels, ignore_index, shift);
  const Layout layout(device, targets, cu_seqlens, pairs, pair_weight);
  const int64_t P = layout.P();
  device.check(slopes, "slopes");
  check_shape(slopes, {2 * P}, "slopes");
  const DType dtype = compute_dtype_of(slopes, "slopes");
  const Tensor saved_slopes = as_contiguous(slopes);
  const Tensor saved_counts = check_counts(device, counts, layout.S());
  const LossReduction how = make_reduction(sft_weight, sft_reduction, reduction, empty);
  const auto check_gradient = [&](const std::optional<Tensor>& gradient, int64_t length,
                                  const char* name) {
    return OutputGradient::check(device, gradient, slopes, {length}, name);
  };
  const auto check_reduced_gradient = [&](const std::optional<Tensor>& gradient, const char* name) {
    return how.reduction == Reduction::kNone
               ? check_gradient(gradient, P, name)
               : OutputGradient::check(device, gradient, slopes, {}, name);
  };
  const OutputGradient of_loss = check_reduced_gradient(grad_loss, "grad_loss");
  const OutputGradient of_losses = check_gradient(grad_losses, P, "grad_losses");
  const OutputGradient of_logps = check_gradient(grad_logps, 2 * P, "grad_logps");
  const OutputGradient of_sft_loss = check_reduced_gradient(grad_sft_loss, "grad_sft_loss");
  Tensor grad_token_logps = layout.new_gradient(slopes, targets);
  device.preference_loss_backward({
      .dtype = dtype,
      .targets = targets,
      .sequences = layout.sequences(),
      .pairs = layout.pairs(),
      .average = average_log_prob,
      .reduction = how,
      .slopes = saved_slopes.const_data_ptr(),
      .counts = saved_counts.template const_data_ptr<int64_t>(),
      .grad_loss = of_loss.data,
      .grad_loss_stride = of_loss.stride,
      .grad_losses = of_losses.data,
      .grad_losses_stride = of_losses.stride,
      .grad_logps = of_logps.data,
      .grad_logps_stride = of_logps.stride,
      .grad_sft_loss = of_sft_loss.data,
      .grad_sft_loss_stride = of_sft_loss.stride,
      .grad_token_logps = grad_token_logps.mutable_data_ptr(),
  });
  return grad_token_logps;
}

}  // namespace simpo_ext::ops
