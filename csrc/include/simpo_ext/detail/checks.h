// Argument checks: each error names the argument, what was expected and what came.
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

inline void check_number(const char* name, double value, bool in_range, const char* expected) {
  TORCH_CHECK_VALUE(std::isfinite(value) && in_range, name, ": expected ", expected, ", got ",
                    value);
}

// Whether the library has kernels for it; of a CUDA device, what torch and the library are built
// for decides.
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
              device, "; move it with .cpu(), or build simpo_ext from source where nvcc is");
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
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, ": expected device ", other.device(),
                    " as of ", owner, ", got ", tensor.device());
}

// Logits whose memory the backward may overwrite with their gradient.
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

// Labels for tokens [B, T, ...].
inline void check_labels(const at::Tensor& labels, const char* owner, const at::Tensor& tokens) {
  check_tensor("labels", labels);
  const at::ScalarType dtype = labels.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kLong || dtype == at::kInt || dtype == at::kShort ||
                       dtype == at::kChar || dtype == at::kByte,
                   "labels: expected an integer dtype (int64, int32, int16, int8, uint8), got ",
                   dtype);
  TORCH_CHECK_VALUE(
      labels.dim() == 2 && labels.size(0) == tokens.size(0) && labels.size(1) == tokens.size(1),
      "labels: expected shape [B, T] as of ", owner, " ", tokens.sizes(), ", got ", labels.sizes());
  check_same_device("labels", labels, owner, tokens);
}

inline void check_token_options(const TokenLogpsOptions& options) {
  check_number("logit_scale", options.logit_scale, options.logit_scale >= 1e-30,
               "a finite number >= 1e-30");
  if (options.softcap.has_value()) {
    check_number("softcap", *options.softcap, *options.softcap >= 1e-30 && *options.softcap <= 1e30,
                 "a number in [1e-30, 1e30]");
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

// As of hidden: what goes into the same product.
inline void check_factor(const char* name, const at::Tensor& tensor, const at::Tensor& hidden) {
  check_same_device(name, tensor, "hidden", hidden);
  TORCH_CHECK_TYPE(tensor.scalar_type() == hidden.scalar_type(), name, ": expected dtype ",
                   hidden.scalar_type(), " as of hidden, got ", tensor.scalar_type());
}

inline void check_linear_shapes(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& labels, const LinearOptions& linear) {
  check_floating("hidden", hidden);
  check_floating("weight", weight);
  TORCH_CHECK_VALUE(hidden.dim() == 3, "hidden: expected shape [B, T, H], got ", hidden.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == hidden.size(2),
                    "weight: expected shape [V, H], H as of hidden ", hidden.sizes(), ", got ",
                    weight.sizes());
  if (linear.bias.has_value()) {
    check_floating("bias", *linear.bias);
    TORCH_CHECK_VALUE(linear.bias->dim() == 1 && linear.bias->size(0) == weight.size(0),
                      "bias: expected shape [V], V as of weight ", weight.sizes(), ", got ",
                      linear.bias->sizes());
  }
  check_labels(labels, "hidden", hidden);
  TORCH_CHECK_VALUE(linear.logits_budget_bytes.value_or(0) >= 0,
                    "logits_budget_bytes: expected 0 or more, got ",
                    linear.logits_budget_bytes.value_or(0));
  TORCH_CHECK_VALUE(linear.num_valid_tokens.value_or(0) >= 0,
                    "num_valid_tokens: expected 0 or more, got ",
                    linear.num_valid_tokens.value_or(0));
}

inline void check_normalizer(const char* name, const std::optional<Normalizer>& normalizer,
                             Reduction reduction) {
  if (!normalizer.has_value()) return;
  TORCH_CHECK_VALUE(reduction == Reduction::kMean, name,
                    ": expected none without Reduction::kMean, which alone divides");
  if (const double* number = normalizer->number()) {
    check_number(name, *number, *number > 0.0, "a finite number > 0");
    return;
  }
  const at::Tensor& tensor = *normalizer->tensor();
  TORCH_CHECK_TYPE(tensor.defined(), name, ": expected a number or a tensor, got an undefined one");
  TORCH_CHECK_VALUE(tensor.dim() == 0, name, ": expected a tensor of no dimension, got shape ",
                    tensor.sizes());
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype != at::kBFloat16 && dtype != at::kHalf, name,
                   ": expected a dtype that holds counts, such as float32, got ", dtype);
}

// The ratio gamma / beta.
inline double check_simpo_options(const SimPOOptions& options) {
  check_number("beta", options.beta, options.beta > 0.0, "a finite number > 0");
  check_number("label_smoothing", options.label_smoothing,
               options.label_smoothing >= 0.0 && options.label_smoothing <= 0.5,
               "a number in [0, 0.5]");
  TORCH_CHECK_VALUE(options.loss_type == LossType::kSigmoid || options.label_smoothing == 0.0,
                    "label_smoothing: expected 0 with the hinge loss and IPO, got ",
                    options.label_smoothing);
  const double alpha = std::fabs(options.alpha);
  check_number("alpha", options.alpha, alpha == 0.0 || (alpha >= 1e-30 && alpha <= 1e30),
               "0 or a magnitude in [1e-30, 1e30]");
  check_number("sft_weight", options.sft_weight, options.sft_weight >= 0.0, "a finite number >= 0");
  TORCH_CHECK_VALUE(!(options.gamma.has_value() && options.gamma_beta_ratio.has_value()),
                    "gamma, gamma_beta_ratio: expected at most one of the two, got both");
  const bool token_wise_sft = options.sft_reduction == SftReduction::kToken;
  TORCH_CHECK_VALUE(!(token_wise_sft && options.reduction == Reduction::kNone),
                    "sft_reduction: expected kSequence with Reduction::kNone, got kToken");
  check_normalizer("pair_normalizer", options.pair_normalizer, options.reduction);
  check_normalizer("token_normalizer", options.token_normalizer, options.reduction);
  TORCH_CHECK_VALUE(options.pair_normalizer.has_value() || !options.token_normalizer.has_value(),
                    "token_normalizer: expected a pair_normalizer beside it, got none");
  TORCH_CHECK_VALUE(
      !token_wise_sft ||
          options.token_normalizer.has_value() == options.pair_normalizer.has_value(),
      "token_normalizer: expected one beside pair_normalizer with SftReduction::kToken, got none");
  const double default_ratio = options.loss_type == LossType::kIpo ? 0.0 : 0.5;
  const double ratio = options.gamma.has_value() ? *options.gamma / options.beta
                                                 : options.gamma_beta_ratio.value_or(default_ratio);
  check_number("gamma_beta_ratio", ratio, true, "a finite number");
  return ratio;
}

}  // namespace simpo_ext::detail
