// The CPU implementations: check, allocate, forward to csrc/cpu. No arithmetic.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"

namespace simpo_ext::ops {
namespace {

using torch::stable::new_empty;

// Threads come from torch's intra-op pool, so torch.set_num_threads governs them.
constexpr ParallelFor kTorchThreads{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      torch::stable::parallel_for(begin, end, grain,
                                  [body, context](int64_t b, int64_t e) { body(b, e, context); });
    }};

TokenStrides token_strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1)}; }

Targets make_targets(const Tensor& labels, int64_t ignore_index, bool shift) {
  check_cpu(labels, "labels");
  check_dtype(labels, ScalarType::Long, "labels");
  STD_TORCH_CHECK(labels.dim() == 2, "labels: expected shape [B, T], got ", shape_text(labels));
  return {labels.const_data_ptr<int64_t>(),
          token_strides(labels),
          labels.size(0),
          labels.size(1),
          ignore_index,
          shift};
}

struct Logits {
  DType dtype;
  int64_t B, T, V;
};

Logits check_logits(const Tensor& logits, const Tensor& labels) {
  check_cpu(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 3, "logits: expected shape [B, T, V], got ", shape_text(logits));
  const Logits checked{dtype_of(logits, "logits"), logits.size(0), logits.size(1), logits.size(2)};
  check_shape(labels, {checked.B, checked.T}, "labels");
  return checked;
}

bool has_unit_stride_in_vocabulary(const Tensor& logits) {
  return logits.size(2) <= 1 || logits.stride(2) == 1;
}

// Two rows that share memory cannot both be overwritten.
bool has_distinct_rows(const Tensor& logits) {
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  const int64_t stride_b = logits.stride(0), stride_t = logits.stride(1);
  if (B * T * V == 0) return true;
  const bool time_apart = T == 1 || stride_t >= V;
  const bool batch_apart = B == 1 || stride_b >= V;
  const bool nested =
      B == 1 || T == 1 || stride_b >= (T - 1) * stride_t + V || stride_t >= (B - 1) * stride_b + V;
  return time_apart && batch_apart && nested;
}

std::tuple<Tensor, Tensor, Tensor> token_logps(const Tensor& logits, const Tensor& labels,
                                               int64_t ignore_index, bool shift, double logit_scale,
                                               double softcap) {
  const Logits checked = check_logits(logits, labels);
  const Tensor rows =
      has_unit_stride_in_vocabulary(logits) ? logits : torch::stable::contiguous(logits);
  Tensor logps = new_empty(logits, {checked.B, checked.T}, compute_scalar_type(checked.dtype));
  Tensor max = new_empty(logits, {checked.B, checked.T}, compute_scalar_type(checked.dtype));
  Tensor sum_exp = new_empty(logits, {checked.B, checked.T}, ScalarType::Double);
  const TokenLogpsArgs args{
      .dtype = checked.dtype,
      .V = checked.V,
      .logits = rows.const_data_ptr(),
      .logits_strides = token_strides(rows),
      .targets = make_targets(labels, ignore_index, shift),
      .transform = {logit_scale, softcap},
      .logps = logps.mutable_data_ptr(),
      .max = max.mutable_data_ptr(),
      .sum_exp = sum_exp.mutable_data_ptr<double>(),
  };
  check_labels_in_range(cpu::token_logps(args, kTorchThreads), ignore_index, checked.V);
  return {logps, max, sum_exp};
}

// dlogits may be logits itself.
void token_logps_backward_into(const Tensor& dlogits, const Tensor& grad_logps,
                               const Tensor& logits, const Tensor& labels, const Tensor& max,
                               const Tensor& sum_exp, int64_t ignore_index, bool shift,
                               double logit_scale, double softcap) {
  const Logits checked = check_logits(logits, labels);
  check_cpu(grad_logps, "grad_logps");
  check_shape(grad_logps, {checked.B, checked.T}, "grad_logps");
  check_dtype(grad_logps, compute_scalar_type(checked.dtype), "grad_logps");
  check_cpu(max, "max");
  check_shape(max, {checked.B, checked.T}, "max");
  check_dtype(max, compute_scalar_type(checked.dtype), "max");
  check_cpu(sum_exp, "sum_exp");
  check_shape(sum_exp, {checked.B, checked.T}, "sum_exp");
  check_dtype(sum_exp, ScalarType::Double, "sum_exp");
  const Tensor saved_max = torch::stable::contiguous(max);
  const Tensor saved_sum_exp = torch::stable::contiguous(sum_exp);
  const TokenLogpsBackwardArgs args{
      .dtype = checked.dtype,
      .V = checked.V,
      .logits = logits.const_data_ptr(),
      .logits_strides = token_strides(logits),
      .targets = make_targets(labels, ignore_index, shift),
      .transform = {logit_scale, softcap},
      .grad_logps = grad_logps.const_data_ptr(),
      .grad_strides = token_strides(grad_logps),
      .max = saved_max.const_data_ptr(),
      .sum_exp = saved_sum_exp.const_data_ptr<double>(),
      .dlogits = dlogits.mutable_data_ptr(),
      .dlogits_strides = token_strides(dlogits),
  };
  check_labels_in_range(cpu::token_logps_backward(args, kTorchThreads), ignore_index, checked.V);
}

Tensor token_logps_backward(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                            const Tensor& max, const Tensor& sum_exp, int64_t ignore_index,
                            bool shift, double logit_scale, double softcap) {
  const Logits checked = check_logits(logits, labels);
  const Tensor rows =
      has_unit_stride_in_vocabulary(logits) ? logits : torch::stable::contiguous(logits);
  Tensor dlogits = new_empty(logits, {checked.B, checked.T, checked.V});
  token_logps_backward_into(dlogits, grad_logps, rows, labels, max, sum_exp, ignore_index, shift,
                            logit_scale, softcap);
  return dlogits;
}

void token_logps_backward_inplace(const Tensor& grad_logps, const Tensor& logits,
                                  const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
                                  int64_t ignore_index, bool shift, double logit_scale,
                                  double softcap) {
  check_logits(logits, labels);
  STD_TORCH_CHECK(
      has_unit_stride_in_vocabulary(logits) && has_distinct_rows(logits),
      "logits: expected stride 1 in the vocabulary and rows apart in memory, got strides [",
      logits.stride(0), ", ", logits.stride(1), ", ", logits.stride(2), "] for shape ",
      shape_text(logits));
  token_logps_backward_into(logits, grad_logps, logits, labels, max, sum_exp, ignore_index, shift,
                            logit_scale, softcap);
}

DType check_token_logps(const Tensor& token_logps, const Tensor& labels) {
  check_cpu(token_logps, "token_logps");
  STD_TORCH_CHECK(token_logps.dim() == 2, "token_logps: expected shape [B, T], got ",
                  shape_text(token_logps));
  check_shape(labels, {token_logps.size(0), token_logps.size(1)}, "labels");
  return compute_dtype_of(token_logps, "token_logps");
}

std::tuple<Tensor, Tensor> sequence_logps(const Tensor& token_logps, const Tensor& labels,
                                          int64_t ignore_index, bool shift, bool average_log_prob) {
  const DType dtype = check_token_logps(token_logps, labels);
  const Targets targets = make_targets(labels, ignore_index, shift);
  Tensor logps = new_empty(token_logps, {targets.B});
  Tensor counts = new_empty(token_logps, {targets.B}, ScalarType::Long);
  const SequenceLogpsArgs args{
      .dtype = dtype,
      .token_logps = token_logps.const_data_ptr(),
      .token_strides = token_strides(token_logps),
      .targets = targets,
      .average = average_log_prob,
      .logps = logps.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int64_t>(),
  };
  cpu::sequence_logps(args, kTorchThreads);
  return {logps, counts};
}

// Counts as a forward returned them: [B], contiguous.
Tensor check_counts(const Tensor& counts, int64_t B) {
  check_cpu(counts, "counts");
  check_shape(counts, {B}, "counts");
  check_dtype(counts, ScalarType::Long, "counts");
  return torch::stable::contiguous(counts);
}

Tensor sequence_logps_backward(const Tensor& grad_logps, const Tensor& labels, const Tensor& counts,
                               int64_t ignore_index, bool shift, bool average_log_prob) {
  const Targets targets = make_targets(labels, ignore_index, shift);
  check_cpu(grad_logps, "grad_logps");
  check_shape(grad_logps, {targets.B}, "grad_logps");
  const DType dtype = compute_dtype_of(grad_logps, "grad_logps");
  const Tensor saved_counts = check_counts(counts, targets.B);
  Tensor grad_token_logps = new_empty(grad_logps, {targets.B, targets.T});
  const SequenceLogpsBackwardArgs args{
      .dtype = dtype,
      .targets = targets,
      .average = average_log_prob,
      .grad_logps = grad_logps.const_data_ptr(),
      .grad_stride = grad_logps.stride(0),
      .counts = saved_counts.const_data_ptr<int64_t>(),
      .grad_token_logps = grad_token_logps.mutable_data_ptr(),
  };
  cpu::sequence_logps_backward(args, kTorchThreads);
  return grad_token_logps;
}

LossReduction make_reduction(double sft_weight, int64_t sft_reduction, int64_t reduction,
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss(
    const Tensor& token_logps, const Tensor& labels, int64_t ignore_index, bool shift,
    bool average_log_prob, double beta, double gamma_beta_ratio, int64_t loss_type,
    double label_smoothing, double sft_weight, int64_t sft_reduction, int64_t reduction,
    int64_t empty) {
  const DType dtype = check_token_logps(token_logps, labels);
  const Targets targets = make_targets(labels, ignore_index, shift);
  STD_TORCH_CHECK(targets.B % 2 == 0,
                  "token_logps: expected an even B (chosen, then rejected), got ", targets.B);
  STD_TORCH_CHECK(loss_type == 0 || loss_type == 1, "loss_type: expected 0 or 1, got ", loss_type);
  const LossReduction how = make_reduction(sft_weight, sft_reduction, reduction, empty);
  const int64_t P = targets.B / 2;
  const auto reduced = [&] {
    return how.reduction == Reduction::kNone ? new_empty(token_logps, {P})
                                             : new_empty(token_logps, {});
  };
  Tensor loss = reduced(), losses = new_empty(token_logps, {P});
  Tensor logps = new_empty(token_logps, {2 * P}), rewards = new_empty(token_logps, {2 * P});
  Tensor sft_loss = reduced();
  Tensor metrics = new_empty(token_logps, {kNumMetrics}, ScalarType::Double);
  Tensor slopes = new_empty(token_logps, {P});
  Tensor counts = new_empty(token_logps, {2 * P}, ScalarType::Long);
  const PreferenceLossArgs args{
      .dtype = dtype,
      .token_logps = token_logps.const_data_ptr(),
      .token_strides = token_strides(token_logps),
      .targets = targets,
      .average = average_log_prob,
      .pair_loss = {static_cast<LossType>(loss_type), beta, gamma_beta_ratio, label_smoothing},
      .reduction = how,
      .loss = loss.mutable_data_ptr(),
      .losses = losses.mutable_data_ptr(),
      .logps = logps.mutable_data_ptr(),
      .rewards = rewards.mutable_data_ptr(),
      .sft_loss = sft_loss.mutable_data_ptr(),
      .metrics = metrics.mutable_data_ptr<double>(),
      .slopes = slopes.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int64_t>(),
  };
  cpu::preference_loss(args, kTorchThreads);
  return {loss, losses, logps, rewards, sft_loss, metrics, slopes, counts};
}

struct Gradient {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Of a [P] or [2P] output. An absent gradient is zero.
Gradient check_gradient(const std::optional<Tensor>& gradient, int64_t length, const Tensor& like,
                        const char* name) {
  if (!gradient.has_value()) return {};
  check_cpu(*gradient, name);
  check_dtype(*gradient, like.scalar_type(), name);
  check_shape(*gradient, {length}, name);
  return {gradient->const_data_ptr(), gradient->stride(0)};
}

// Of loss or sft_loss: [P] without a reduction, else a scalar that every pair reads.
Gradient check_reduced_gradient(const std::optional<Tensor>& gradient, Reduction reduction,
                                int64_t P, const Tensor& like, const char* name) {
  if (reduction == Reduction::kNone) return check_gradient(gradient, P, like, name);
  if (!gradient.has_value()) return {};
  check_cpu(*gradient, name);
  check_dtype(*gradient, like.scalar_type(), name);
  check_shape(*gradient, {}, name);
  return {gradient->const_data_ptr(), 0};
}

Tensor preference_loss_backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_losses,
                                std::optional<Tensor> grad_logps,
                                std::optional<Tensor> grad_sft_loss, const Tensor& labels,
                                const Tensor& slopes, const Tensor& counts, int64_t ignore_index,
                                bool shift, bool average_log_prob, double sft_weight,
                                int64_t sft_reduction, int64_t reduction, int64_t empty) {
  const Targets targets = make_targets(labels, ignore_index, shift);
  STD_TORCH_CHECK(targets.B % 2 == 0, "labels: expected an even B (chosen, then rejected), got ",
                  targets.B);
  const int64_t P = targets.B / 2;
  check_cpu(slopes, "slopes");
  check_shape(slopes, {P}, "slopes");
  const DType dtype = compute_dtype_of(slopes, "slopes");
  const Tensor saved_slopes = torch::stable::contiguous(slopes);
  const Tensor saved_counts = check_counts(counts, 2 * P);
  const LossReduction how = make_reduction(sft_weight, sft_reduction, reduction, empty);
  const Gradient of_loss = check_reduced_gradient(grad_loss, how.reduction, P, slopes, "grad_loss");
  const Gradient of_losses = check_gradient(grad_losses, P, slopes, "grad_losses");
  const Gradient of_logps = check_gradient(grad_logps, 2 * P, slopes, "grad_logps");
  const Gradient of_sft_loss =
      check_reduced_gradient(grad_sft_loss, how.reduction, P, slopes, "grad_sft_loss");
  Tensor grad_token_logps = new_empty(slopes, {targets.B, targets.T});
  const PreferenceLossBackwardArgs args{
      .dtype = dtype,
      .targets = targets,
      .average = average_log_prob,
      .reduction = how,
      .slopes = saved_slopes.const_data_ptr(),
      .counts = saved_counts.const_data_ptr<int64_t>(),
      .grad_loss = of_loss.data,
      .grad_loss_stride = of_loss.stride,
      .grad_losses = of_losses.data,
      .grad_losses_stride = of_losses.stride,
      .grad_logps = of_logps.data,
      .grad_logps_stride = of_logps.stride,
      .grad_sft_loss = of_sft_loss.data,
      .grad_sft_loss_stride = of_sft_loss.stride,
      .grad_token_logps = grad_token_logps.mutable_data_ptr(),
  };
  cpu::preference_loss_backward(args, kTorchThreads);
  return grad_token_logps;
}

}  // namespace
}  // namespace simpo_ext::ops

STABLE_TORCH_LIBRARY_IMPL(simpo_ext, CPU, m) {
  m.impl("token_logps", TORCH_BOX(&simpo_ext::ops::token_logps));
  m.impl("token_logps_backward", TORCH_BOX(&simpo_ext::ops::token_logps_backward));
  m.impl("token_logps_backward_", TORCH_BOX(&simpo_ext::ops::token_logps_backward_inplace));
  m.impl("sequence_logps", TORCH_BOX(&simpo_ext::ops::sequence_logps));
  m.impl("sequence_logps_backward", TORCH_BOX(&simpo_ext::ops::sequence_logps_backward));
  m.impl("preference_loss", TORCH_BOX(&simpo_ext::ops::preference_loss));
  m.impl("preference_loss_backward", TORCH_BOX(&simpo_ext::ops::preference_loss_backward));
}
