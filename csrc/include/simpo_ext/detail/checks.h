// Argument checks. Each error has the name of the argument, the expectation and the value.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "simpo_ext/build_info.h"
#include "simpo_ext/options.h"

namespace simpo_ext::detail {

// ---- numbers --------------------------------------------------------------------------------

inline void check_finite(const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, ": expected a finite number, got ", value);
}

inline void check_above(const char* name, double value, double bound) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value > bound, name, ": expected a finite number > ",
                    bound, ", got ", value);
}

inline void check_at_least(const char* name, double value, double least) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= least, name,
                    ": expected a finite number >= ", least, ", got ", value);
}

inline void check_between(const char* name, double value, double least, double largest) {
  TORCH_CHECK_VALUE(value >= least && value <= largest, name, ": expected a number in [", least,
                    ", ", largest, "], got ", value);
}

inline void check_zero_or_magnitude_between(const char* name, double value, double least,
                                            double largest) {
  const double magnitude = std::fabs(value);
  TORCH_CHECK_VALUE(value == 0.0 || (magnitude >= least && magnitude <= largest), name,
                    ": expected 0 or a magnitude in [", least, ", ", largest, "], got ", value);
}

inline void check_count(const char* name, const std::optional<int64_t>& count) {
  TORCH_CHECK_VALUE(count.value_or(0) >= 0, name, ": expected 0 or more, got ", count.value_or(0));
}

// ---- tensors --------------------------------------------------------------------------------

// Refuses a device that the library has no kernels for. Whether it has kernels for a CUDA device
// depends on the builds of torch and of the library.
inline void check_device(const char* name, const at::Device& device, bool torch_is_for_rocm,
                         bool library_has_cuda) {
  TORCH_CHECK(device.is_cpu() || device.is_cuda(), name,
              ": simpo_ext has kernels for CPU and CUDA tensors, got a tensor on ", device,
              "; move it with .cpu()");
  if (device.is_cpu()) return;
  TORCH_CHECK(!torch_is_for_rocm, name,
              ": simpo_ext has kernels for NVIDIA GPUs and for CPUs, got a tensor on a GPU under "
              "ROCm; move it with .cpu()");
  TORCH_CHECK(library_has_cuda, name,
              ": this build of simpo_ext has kernels for CPU tensors only, got a tensor on ",
              device, "; move it with .cpu(), or build simpo_ext from source with nvcc");
}

inline void check_tensor(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), name, ": expected a tensor, got an undefined one");
  TORCH_CHECK_TYPE(!tensor.is_nested(), name, ": expected a dense tensor, got a nested one");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, ": expected a dense tensor, got layout ",
                   tensor.layout());
  if (tensor.device().is_cpu()) return;
  check_device(name, tensor.device(), at::detail::getCUDAHooks().hasROCM(),
               build_info().cuda_runtime_version != 0);
}

inline void check_same_device(const char* name, const at::Tensor& tensor, const char* owner,
                              const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, ": expected a tensor on ",
                    other.device(), " like ", owner, ", got ", tensor.device());
}

// Refuses logits that the backward must not overwrite with their gradient.
inline void check_inplace_backward(const at::Tensor& logits) {
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) return;
  TORCH_CHECK_VALUE(
      !logits.is_leaf() && !(logits.is_view() && logits._base().is_leaf()),
      "inplace_backward: expected logits computed from other tensors, got a leaf that "
      "requires grad (or a view of one), whose values the backward would overwrite");
  if (logits.numel() == 0) return;
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  const int64_t stride_b = logits.stride(0), stride_t = logits.stride(1);
  const bool apart = (T == 1 || stride_t >= V) && (B == 1 || stride_b >= V) &&
                     (B == 1 || T == 1 || stride_b >= (T - 1) * stride_t + V ||
                      stride_t >= (B - 1) * stride_b + V);
  TORCH_CHECK_VALUE(
      apart && (V == 1 || logits.stride(2) == 1),
      "inplace_backward: expected logits with stride 1 in the vocabulary and rows apart "
      "in memory, got strides ",
      logits.strides(), " for shape ", logits.sizes());
}

inline void check_floating(const char* name, const at::Tensor& tensor) {
  check_tensor(name, tensor);
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      name, ": expected dtype float64, float32, bfloat16 or float16, got ", dtype);
}

// Labels [B, T] for tokens [B, T, ...].
inline void check_labels(const at::Tensor& labels, const char* owner, const at::Tensor& tokens) {
  check_tensor("labels", labels);
  const at::ScalarType dtype = labels.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kLong || dtype == at::kInt || dtype == at::kShort ||
                       dtype == at::kChar || dtype == at::kByte,
                   "labels: expected an integer dtype (int64, int32, int16, int8, uint8), got ",
                   dtype);
  TORCH_CHECK_VALUE(
      labels.dim() == 2 && labels.size(0) == tokens.size(0) && labels.size(1) == tokens.size(1),
      "labels: expected shape [B, T] to match ", owner, " ", tokens.sizes(), ", got ",
      labels.sizes());
  check_same_device("labels", labels, owner, tokens);
}

inline void check_token_options(const TokenLogpsOptions& options) {
  check_at_least("logit_scale", options.logit_scale, kLeastFactor);
  if (options.softcap.has_value()) {
    check_between("softcap", *options.softcap, kLeastFactor, kLargestFactor);
  }
}

inline void check_token_arguments(const at::Tensor& logits, const at::Tensor& labels,
                                  const TokenLogpsOptions& options) {
  check_floating("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 3, "logits: expected shape [B, T, V], got ", logits.sizes());
  check_labels(labels, "logits", logits);
  check_token_options(options);
  if (options.inplace_backward) check_inplace_backward(logits);
}

// Refuses a factor whose device or dtype differs from that of hidden.
inline void check_factor(const char* name, const at::Tensor& tensor, const at::Tensor& hidden) {
  check_same_device(name, tensor, "hidden", hidden);
  TORCH_CHECK_TYPE(tensor.scalar_type() == hidden.scalar_type(), name, ": expected dtype ",
                   hidden.scalar_type(), " like hidden, got ", tensor.scalar_type());
}

inline void check_linear_shapes(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& labels, const LinearOptions& linear) {
  check_floating("hidden", hidden);
  check_floating("weight", weight);
  TORCH_CHECK_VALUE(hidden.dim() == 3, "hidden: expected shape [B, T, H], got ", hidden.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == hidden.size(2),
                    "weight: expected shape [V, H] to match hidden ", hidden.sizes(), ", got ",
                    weight.sizes());
  if (linear.bias.has_value()) {
    check_floating("bias", *linear.bias);
    TORCH_CHECK_VALUE(linear.bias->dim() == 1 && linear.bias->size(0) == weight.size(0),
                      "bias: expected shape [V] to match weight ", weight.sizes(), ", got ",
                      linear.bias->sizes());
  }
  check_labels(labels, "hidden", hidden);
  check_count("logits_budget_bytes", linear.logits_budget_bytes);
  check_count("num_valid_tokens", linear.num_valid_tokens);
}

inline void check_normalizer(const char* name, const std::optional<Normalizer>& normalizer,
                             Reduction reduction) {
  if (!normalizer.has_value()) return;
  TORCH_CHECK_VALUE(reduction == Reduction::kMean, name,
                    ": expected none unless reduction is Reduction::kMean");
  if (const double* number = normalizer->number()) {
    check_above(name, *number, 0.0);
    return;
  }
  const at::Tensor& tensor = *normalizer->tensor();
  TORCH_CHECK_TYPE(tensor.defined(), name, ": expected a number or a tensor, got an undefined one");
  TORCH_CHECK_VALUE(tensor.dim() == 0, name, ": expected a tensor without dimensions, got shape ",
                    tensor.sizes());
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype != at::kBFloat16 && dtype != at::kHalf, name,
                   ": expected a dtype that holds counts, such as float32, got ", dtype);
}

// Returns gamma / beta.
inline double check_simpo_options(const SimPOOptions& options) {
  check_above("beta", options.beta, 0.0);
  check_between("label_smoothing", options.label_smoothing, 0.0, 0.5);
  TORCH_CHECK_VALUE(options.loss_type == LossType::kSigmoid || options.label_smoothing == 0.0,
                    "label_smoothing: expected 0 with the hinge loss and IPO, got ",
                    options.label_smoothing);
  check_zero_or_magnitude_between("alpha", options.alpha, kLeastFactor, kLargestFactor);
  check_at_least("sft_weight", options.sft_weight, 0.0);
  TORCH_CHECK_VALUE(!(options.gamma.has_value() && options.gamma_beta_ratio.has_value()),
                    "gamma, gamma_beta_ratio: expected at most one of the two, got both");
  const bool token_wise_sft = options.sft_reduction == SftReduction::kToken;
  TORCH_CHECK_VALUE(!(token_wise_sft && options.reduction == Reduction::kNone),
                    "sft_reduction: expected kSequence with Reduction::kNone, got kToken");
  check_normalizer("pair_normalizer", options.pair_normalizer, options.reduction);
  check_normalizer("token_normalizer", options.token_normalizer, options.reduction);
  TORCH_CHECK_VALUE(options.pair_normalizer.has_value() || !options.token_normalizer.has_value(),
                    "token_normalizer: expected a pair_normalizer as well, got none");
  TORCH_CHECK_VALUE(
      !token_wise_sft ||
          options.token_normalizer.has_value() == options.pair_normalizer.has_value(),
      "token_normalizer: expected one with pair_normalizer and SftReduction::kToken, got none");
  const double default_ratio = options.loss_type == LossType::kIpo ? 0.0 : 0.5;
  const double ratio = options.gamma.has_value() ? *options.gamma / options.beta
                                                 : options.gamma_beta_ratio.value_or(default_ratio);
  check_finite("gamma_beta_ratio", ratio);
  return ratio;
}

}  // namespace simpo_ext::detail
