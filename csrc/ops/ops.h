// The ops on any device: check, allocate, forward to the kernels. No arithmetic.
//
// Device says where tensors have to lie and calls that device's kernels:
//   Device(tensor, name)        for the duration of an op; refuses a tensor it has no kernels for
//   check(tensor, name)         refuses a tensor that lies elsewhere than the first
//   new_large(like, sizes)      memory for something of the size of logits, zeros where that is
//   free new_large_for_writing(like, sizes)    the same for what is written whole
//   token_logps(args), ...      the kernels of core/kernels.h, with their errors thrown
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"

namespace simpo_ext::ops {

// Of a contiguous tensor of at most three dimensions.
class ContiguousStrides {
 public:
  explicit ContiguousStrides(std::initializer_list<int64_t> sizes) {
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides_[d] = stride;
      stride *= std::max<int64_t>(sizes.begin()[d], 1);
    }
  }

  const int64_t* data() const { return strides_.data(); }

 private:
  std::array<int64_t, 3> strides_{};
};

// An uninitialized contiguous tensor of at most three dimensions on the device of `like`, and of
// its dtype unless told. Not torch::stable's, which finds an op by its name and dispatches it: for
// the nine small tensors of preference_loss that takes longer than all they hold.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        std::optional<ScalarType> dtype = std::nullopt) {
  const ContiguousStrides strides(sizes);
  using torch::stable::detail::from, torch::stable::detail::to;
  const auto shim_dtype = to<int32_t>(from(dtype.value_or(like.scalar_type())));
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.begin(), strides.data(), shim_dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// Dispatches nothing where there is nothing to copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline TokenStrides token_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1)};
}

inline bool has_unit_stride_in_vocabulary(const Tensor& logits) {
  return logits.size(2) <= 1 || logits.stride(2) == 1;
}

// Two rows that share memory cannot both be overwritten.
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

// A new contiguous tensor to be written to.
struct LargeTensor {
  Tensor tensor;
  bool holds_zeros;
};

inline LargeTensor new_empty_large(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return {new_empty(like, sizes), false};
}

template <class Device>
Targets make_targets(const Device& device, const Tensor& labels, int64_t ignore_index, bool shift) {
  device.check(labels, "labels");
  check_dtype(labels, ScalarType::Long, "labels");
  STD_TORCH_CHECK(labels.dim() == 2, "labels: expected shape [B, T], got ", shape_text(labels));
  return {labels.const_data_ptr<int64_t>(),
          token_strides(labels),
          labels.size(0),
          labels.size(1),
          ignore_index,
          shift};
}

// Where the sequences of targets lie and which are pairs, with the tensors that say so.
class Layout {
 public:
  // Of targets that are aligned already in the flat layout, whose labels a shift would take across
  // the ends of sequences.
  template <class Device>
  Layout(const Device& device, const Targets& targets, const std::optional<Tensor>& cu_seqlens) {
    sequences_ = {nullptr, targets.B};
    if (!cu_seqlens.has_value()) return;
    STD_TORCH_CHECK(!targets.shift, "shift: expected false with cu_seqlens, got true");
    STD_TORCH_CHECK(targets.B == 1,
                    "labels: expected shape [1, N] with cu_seqlens, got B = ", targets.B);
    cu_seqlens_ = checked(device, *cu_seqlens, ScalarType::Long, "cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0,
                    "cu_seqlens: expected shape [S + 1], got ", shape_text(*cu_seqlens));
    sequences_ = {cu_seqlens_->template const_data_ptr<int64_t>(), cu_seqlens->size(0) - 1};
  }

  template <class Device>
  Layout(const Device& device, const Targets& targets, const std::optional<Tensor>& cu_seqlens,
         const std::optional<Tensor>& pairs, const std::optional<Tensor>& pair_weight)
      : Layout(device, targets, cu_seqlens) {
    if (pairs.has_value()) {
      pairs_tensor_ = checked(device, *pairs, ScalarType::Long, "pairs");
      STD_TORCH_CHECK(pairs->dim() == 2 && pairs->size(1) == 2,
                      "pairs: expected shape [P, 2], got ", shape_text(*pairs));
      pairs_.indices = pairs_tensor_->template const_data_ptr<int64_t>();
      pairs_.P = pairs->size(0);
    } else {
      STD_TORCH_CHECK(sequences_.S % 2 == 0,
                      "token_logps: expected an even number of sequences without pairs (chosen, "
                      "then rejected), got ",
                      sequences_.S);
      pairs_.P = sequences_.S / 2;
    }
    if (pair_weight.has_value()) {
      weights_tensor_ = checked(device, *pair_weight, ScalarType::Double, "pair_weight");
      check_shape(*pair_weight, {pairs_.P}, "pair_weight");
      pairs_.weights = weights_tensor_->template const_data_ptr<double>();
    }
  }

  const Sequences& sequences() const { return sequences_; }
  const Pairs& pairs() const { return pairs_; }
  int64_t S() const { return sequences_.S; }
  int64_t P() const { return pairs_.P; }

  // [B, T] like `like`, for the gradient of token log-probs.
  Tensor new_gradient(const Tensor& like, const Targets& targets) const {
    Tensor gradient = new_empty(like, {targets.B, targets.T});
    if (cu_seqlens_.has_value()) torch::stable::zero_(gradient);  // where there is no sequence
    return gradient;
  }

 private:
  template <class Device>
  static Tensor checked(const Device& device, const Tensor& tensor, ScalarType dtype,
                        const char* name) {
    device.check(tensor, name);
    check_dtype(tensor, dtype, name);
    return as_contiguous(tensor);
  }

  std::optional<Tensor> cu_seqlens_, pairs_tensor_, weights_tensor_;
  Sequences sequences_{};
  Pairs pairs_{};
};

// Which labels of all of them the columns of logits are.
struct VocabPart {
  int64_t first_label;
  int64_t num_labels;

  // Of V columns.
  void check(int64_t V) const {
    STD_TORCH_CHECK(first_label >= 0 && V <= num_labels - first_label,
                    "first_label, num_labels: expected ", V,
                    " labels from first_label on within [0, num_labels), got ", first_label,
                    " and ", num_labels);
  }
};

template <class Device>
class Ops {
 public:
  // ---- token_logps --------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor> token_logps(const Tensor& logits, const Tensor& labels,
                                                        int64_t ignore_index, bool shift,
                                                        double logit_scale, double softcap) {
    const Device device(logits, "logits");
    return token_logps_forward(device, logits, labels, ignore_index, shift, logit_scale, softcap,
                               nullptr, nullptr, false);
  }

  // And what is reported of each row.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_logps_report(
      const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool shift,
      double logit_scale, double softcap, bool all_positions) {
    const Device device(logits, "logits");
    const Logits checked = check_logits(logits, labels);
    Tensor mean_logit = new_empty(logits, {checked.B, checked.T}, ScalarType::Double);
    Tensor entropy = new_empty(logits, {checked.B, checked.T}, ScalarType::Double);
    const auto [logps, max, sum_exp] = token_logps_forward(
        device, logits, labels, ignore_index, shift, logit_scale, softcap,
        mean_logit.mutable_data_ptr<double>(), entropy.mutable_data_ptr<double>(), all_positions);
    return {logps, max, sum_exp, mean_logit, entropy};
  }

  static Tensor token_logps_backward(const Tensor& grad_logps, const Tensor& logits,
                                     const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
                                     int64_t ignore_index, bool shift, double logit_scale,
                                     double softcap) {
    const Device device(logits, "logits");
    check_logits(logits, labels);
    const Tensor rows = with_unit_stride(logits);
    const LargeTensor dlogits =
        device.new_large(logits, {logits.size(0), logits.size(1), logits.size(2)});
    token_logps_backward_into(device, dlogits, grad_logps, rows, labels, max, sum_exp,
                              all_labels_of(logits), ignore_index, shift, logit_scale, softcap);
    return dlogits.tensor;
  }

  static void token_logps_backward_inplace(const Tensor& grad_logps, const Tensor& logits,
                                           const Tensor& labels, const Tensor& max,
                                           const Tensor& sum_exp, int64_t ignore_index, bool shift,
                                           double logit_scale, double softcap) {
    const Device device(logits, "logits");
    check_overwritable(logits, labels);
    token_logps_backward_into(device, {logits, false}, grad_logps, logits, labels, max, sum_exp,
                              all_labels_of(logits), ignore_index, shift, logit_scale, softcap);
  }

  // ---- sequence_logps -----------------------------------------------------------------------

  static Tensor sequence_targets(const Tensor& labels, const Tensor& cu_seqlens, int64_t num_labels,
                                 int64_t ignore_index, bool shift) {
    const Device device(labels, "labels");
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

  static std::tuple<Tensor, Tensor> sequence_logps(const Tensor& token_logps, const Tensor& labels,
                                                   std::optional<Tensor> cu_seqlens,
                                                   int64_t ignore_index, bool shift,
                                                   bool average_log_prob) {
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

  static Tensor sequence_logps_backward(const Tensor& grad_logps, const Tensor& labels,
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

  // ---- preference_loss ----------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss(
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
    const auto reduced = [&] {
      return how.reduction == Reduction::kNone ? new_empty(token_logps, {P})
                                               : new_empty(token_logps, {});
    };
    Tensor loss = reduced(), losses = new_empty(token_logps, {P});
    Tensor logps = new_empty(token_logps, {2 * P}), rewards = new_empty(token_logps, {2 * P});
    Tensor sft_loss = reduced();
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

  static Tensor preference_loss_backward(
      std::optional<Tensor> grad_loss, std::optional<Tensor> grad_losses,
      std::optional<Tensor> grad_logps, std::optional<Tensor> grad_sft_loss, const Tensor& labels,
      std::optional<Tensor> cu_seqlens, std::optional<Tensor> pairs,
      std::optional<Tensor> pair_weight, const Tensor& slopes, const Tensor& counts,
      int64_t ignore_index, bool shift, bool average_log_prob, double sft_weight,
      int64_t sft_reduction, int64_t reduction, int64_t empty) {
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
      return Gradient::check(device, gradient, slopes, {length}, name);
    };
    const auto check_reduced_gradient = [&](const std::optional<Tensor>& gradient,
                                            const char* name) {
      return how.reduction == Reduction::kNone
                 ? check_gradient(gradient, P, name)
                 : Gradient::check(device, gradient, slopes, {}, name);
    };
    const Gradient of_loss = check_reduced_gradient(grad_loss, "grad_loss");
    const Gradient of_losses = check_gradient(grad_losses, P, "grad_losses");
    const Gradient of_logps = check_gradient(grad_logps, 2 * P, "grad_logps");
    const Gradient of_sft_loss = check_reduced_gradient(grad_sft_loss, "grad_sft_loss");
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

 protected:
  struct Logits {
    DType dtype;
    int64_t B, T, V;
  };

  static Logits check_logits(const Tensor& logits, const Tensor& labels) {
    STD_TORCH_CHECK(logits.dim() == 3, "logits: expected shape [B, T, V], got ",
                    shape_text(logits));
    const Logits checked{dtype_of(logits, "logits"), logits.size(0), logits.size(1),
                         logits.size(2)};
    check_shape(labels, {checked.B, checked.T}, "labels");
    return checked;
  }

  static Tensor with_unit_stride(const Tensor& logits) {
    return has_unit_stride_in_vocabulary(logits) ? logits : as_contiguous(logits);
  }

  // mean_logit and entropy are null, or both are given.
  static std::tuple<Tensor, Tensor, Tensor> token_logps_forward(
      const Device& device, const Tensor& logits, const Tensor& labels, int64_t ignore_index,
      bool shift, double logit_scale, double softcap, double* mean_logit, double* entropy,
      bool all_positions) {
    const Logits checked = check_logits(logits, labels);
    const Targets targets = make_targets(device, labels, ignore_index, shift);
    const Tensor rows = with_unit_stride(logits);
    const ScalarType compute = compute_scalar_type(checked.dtype);
    Tensor logps = new_empty(logits, {checked.B, checked.T}, compute);
    Tensor max = new_empty(logits, {checked.B, checked.T}, compute);
    Tensor sum_exp = new_empty(logits, {checked.B, checked.T}, ScalarType::Double);
    const int64_t N = checked.B * checked.T;
    const int64_t num_segments =
        mean_logit != nullptr ? 0 : device.shared_segments(checked.dtype, N, checked.V);
    std::optional<Tensor> segments;
    if (num_segments > 0) segments = new_empty(logits, {num_segments, 3, N}, ScalarType::Double);
    device.token_logps({
        .dtype = checked.dtype,
        .V = checked.V,
        .logits = rows.const_data_ptr(),
        .logits_strides = token_strides(rows),
        .targets = targets,
        .transform = {logit_scale, softcap},
        .logps = logps.mutable_data_ptr(),
        .max = max.mutable_data_ptr(),
        .sum_exp = sum_exp.mutable_data_ptr<double>(),
        .mean_logit = mean_logit,
        .entropy = entropy,
        .all_positions = all_positions,
        .segments = segments ? segments->mutable_data_ptr<double>() : nullptr,
    });
    return {logps, max, sum_exp};
  }

  static void check_overwritable(const Tensor& logits, const Tensor& labels) {
    check_logits(logits, labels);
    STD_TORCH_CHECK(
        has_unit_stride_in_vocabulary(logits) && has_distinct_rows(logits),
        "logits: expected stride 1 in the vocabulary and rows apart in memory, got strides [",
        logits.stride(0), ", ", logits.stride(1), ", ", logits.stride(2), "] for shape ",
        shape_text(logits));
  }

  static VocabPart all_labels_of(const Tensor& logits) { return {0, logits.size(2)}; }

  // dlogits may be logits itself.
  static void token_logps_backward_into(const Device& device, const LargeTensor& dlogits,
                                        const Tensor& grad_logps, const Tensor& logits,
                                        const Tensor& labels, const Tensor& max,
                                        const Tensor& sum_exp, const VocabPart& part,
                                        int64_t ignore_index, bool shift, double logit_scale,
                                        double softcap) {
    const Logits checked = check_logits(logits, labels);
    const Targets targets = make_targets(device, labels, ignore_index, shift);
    const auto check_row_values = [&](const Tensor& tensor, ScalarType dtype, const char* name) {
      device.check(tensor, name);
      check_shape(tensor, {checked.B, checked.T}, name);
      check_dtype(tensor, dtype, name);
    };
    const ScalarType compute = compute_scalar_type(checked.dtype);
    check_row_values(grad_logps, compute, "grad_logps");
    check_row_values(max, compute, "max");
    check_row_values(sum_exp, ScalarType::Double, "sum_exp");
    const Tensor saved_max = as_contiguous(max);
    const Tensor saved_sum_exp = as_contiguous(sum_exp);
    device.token_logps_backward({
        .dtype = checked.dtype,
        .V = checked.V,
        .logits = logits.const_data_ptr(),
        .logits_strides = token_strides(logits),
        .targets = targets,
        .transform = {logit_scale, softcap},
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

  static DType check_token_logps(const Tensor& token_logps, const Tensor& labels) {
    STD_TORCH_CHECK(token_logps.dim() == 2, "token_logps: expected shape [B, T], got ",
                    shape_text(token_logps));
    check_shape(labels, {token_logps.size(0), token_logps.size(1)}, "labels");
    return compute_dtype_of(token_logps, "token_logps");
  }

  // Counts as a forward returned them: [S], contiguous.
  static Tensor check_counts(const Device& device, const Tensor& counts, int64_t S) {
    device.check(counts, "counts");
    check_shape(counts, {S}, "counts");
    check_dtype(counts, ScalarType::Long, "counts");
    return as_contiguous(counts);
  }

  static LossReduction make_reduction(double sft_weight, int64_t sft_reduction, int64_t reduction,
                                      int64_t empty) {
    STD_TORCH_CHECK(sft_reduction == 0 || sft_reduction == 1,
                    "sft_reduction: expected 0 or 1, got ", sft_reduction);
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

  // Of an output of preference_loss. An absent one is zero; a scalar has stride 0, every pair reads
  // it.
  struct Gradient {
    const void* data = nullptr;
    int64_t stride = 0;

    static Gradient check(const Device& device, const std::optional<Tensor>& gradient,
                          const Tensor& like, std::initializer_list<int64_t> sizes,
                          const char* name) {
      if (!gradient.has_value()) return {};
      device.check(*gradient, name);
      check_dtype(*gradient, like.scalar_type(), name);
      check_shape(*gradient, sizes, name);
      return {gradient->const_data_ptr(), sizes.size() == 0 ? 0 : gradient->stride(0)};
    }
  };
};

// The implementations of every op for one dispatch key.
template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("token_logps", TORCH_BOX(&Ops<Device>::token_logps));
  m.impl("token_logps_report", TORCH_BOX(&Ops<Device>::token_logps_report));
  m.impl("token_logps_backward", TORCH_BOX(&Ops<Device>::token_logps_backward));
  m.impl("token_logps_backward_", TORCH_BOX(&Ops<Device>::token_logps_backward_inplace));
  m.impl("sequence_targets", TORCH_BOX(&Ops<Device>::sequence_targets));
  m.impl("sequence_logps", TORCH_BOX(&Ops<Device>::sequence_logps));
  m.impl("sequence_logps_backward", TORCH_BOX(&Ops<Device>::sequence_logps_backward));
  m.impl("preference_loss", TORCH_BOX(&Ops<Device>::preference_loss));
  m.impl("preference_loss_backward", TORCH_BOX(&Ops<Device>::preference_loss_backward));
}

}  // namespace simpo_ext::ops
