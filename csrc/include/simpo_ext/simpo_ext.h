// SimPO for C++ programs that use libtorch: at::Tensor in, at::Tensor out, with autograd.
//
//   find_package(Torch REQUIRED)
//   find_package(simpo_ext REQUIRED)
//   target_link_libraries(app PRIVATE simpo_ext::simpo_ext)
//
// Header-only and compiled against the includer's libtorch. The compiled library is reached through
// the dispatcher alone, so it needs no libtorch of the same version. Formulas, defaults and edge
// cases are those of the Python function of the same name; B = 2P sequences, chosen rows first.
//
// Errors are c10::TypeError, c10::ValueError, c10::IndexError (label of CPU tensors out of range;
// on a GPU its position becomes NaN) and, for a device without kernels and a double backward,
// c10::Error.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <cmath>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

extern "C" int simpo_ext_anchor();  // in the library; a reference to it keeps the library linked

namespace simpo_ext {

enum class LossType : int64_t { kSigmoid = 0, kHinge = 1 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class SftReduction : int64_t { kSequence = 0, kToken = 1 };
enum class Empty : int64_t { kDrop = 0, kNan = 1 };

struct TokenLogpsOptions {
  int64_t ignore_index = -100;
  bool shift = true;  // the logits at t are scored with labels[:, t + 1]
  double logit_scale = 1.0;
  std::optional<double> softcap{};
  bool inplace_backward = false;  // the backward overwrites logits with their gradient
};

struct SimPOOptions {
  double beta = 2.0;
  std::optional<double> gamma_beta_ratio{};  // 0.5 where neither it nor gamma is given
  std::optional<double> gamma{};
  LossType loss_type = LossType::kSigmoid;
  double label_smoothing = 0.0;
  double sft_weight = 0.0;
  SftReduction sft_reduction = SftReduction::kSequence;
  bool average_log_prob = true;
  Reduction reduction = Reduction::kMean;
  std::optional<double> pair_normalizer{};   // replaces the number of counted pairs in a mean
  std::optional<double> token_normalizer{};  // and that of their chosen tokens
  Empty empty = Empty::kDrop;
  TokenLogpsOptions tokens{};
};

// float32, or float64 for float64 logits. All but rewards and metrics are differentiable.
struct SimPOOutput {
  at::Tensor loss;              // [], or [P] with Reduction::kNone
  at::Tensor losses;            // [P]
  at::Tensor chosen_logps;      // [P]
  at::Tensor rejected_logps;    // [P]
  at::Tensor chosen_rewards;    // [P]
  at::Tensor rejected_rewards;  // [P]
  at::Tensor sft_loss;          // as loss
  // [9] float64: rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
  // logps/chosen, logps/rejected, num_pairs, dropped_pairs, num_tokens.
  at::Tensor metrics;
};

namespace detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  simpo_ext_anchor();
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline double softcap_or_zero(const TokenLogpsOptions& options) {
  return options.softcap.value_or(0.0);
}

// With create_graph the gradient would be taken for a constant, and the second one would be wrong.
inline void refuse_double_backward() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "simpo_ext does not implement double backward: expected create_graph=false");
}

struct TokenLogps : torch::autograd::Function<TokenLogps> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits,
                            const at::Tensor& labels, const TokenLogpsOptions& options) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, int64_t, bool, double, double);
    static const auto op = find_op<Signature>("simpo_ext::token_logps");
    // Below autograd: Python may have registered a formula of its own for the op.
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [logps, max, sum_exp] = [&] {
      try {
        return op.call(logits, labels, options.ignore_index, options.shift, options.logit_scale,
                       softcap_or_zero(options));
      } catch (const std::exception& error) {
        // std::out_of_range where it left the library; torch may have made it an error of its own.
        const std::string message = error.what();
        TORCH_CHECK_INDEX(message.find("is out of range") == std::string::npos,
                          message.substr(0, message.find('\n')));
        throw;
      }
    }();
    ctx->save_for_backward({logits, labels, max, sum_exp});
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["shift"] = options.shift;
    ctx->saved_data["logit_scale"] = options.logit_scale;
    ctx->saved_data["softcap"] = softcap_or_zero(options);
    ctx->saved_data["inplace"] = options.inplace_backward;
    return logps;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Signature =
        at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, int64_t, bool, double, double);
    using InplaceSignature =
        void(const at::Tensor&, at::Tensor&, const at::Tensor&, const at::Tensor&,
             const at::Tensor&, int64_t, bool, double, double);
    static const auto op = find_op<Signature>("simpo_ext::token_logps_backward");
    static const auto inplace_op = find_op<InplaceSignature>("simpo_ext::token_logps_backward_");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &logits = saved[0], &labels = saved[1], &max = saved[2], &sum_exp = saved[3];
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const bool shift = ctx->saved_data["shift"].toBool();
    const double logit_scale = ctx->saved_data["logit_scale"].toDouble();
    const double softcap = ctx->saved_data["softcap"].toDouble();
    at::Tensor dlogits;
    if (ctx->saved_data["inplace"].toBool()) {
      dlogits = logits.detach();
      inplace_op.call(grads[0], dlogits, labels, max, sum_exp, ignore_index, shift, logit_scale,
                      softcap);
      // Whoever saved the logits' values finds a newer version and fails, this node included.
      torch::autograd::impl::bump_version(logits);
    } else {
      dlogits = op.call(grads[0], logits, labels, max, sum_exp, ignore_index, shift, logit_scale,
                        softcap);
    }
    return {dlogits, at::Tensor(), at::Tensor()};
  }
};

struct SequenceLogps : torch::autograd::Function<SequenceLogps> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& token_logps,
                            const at::Tensor& labels, const TokenLogpsOptions& options,
                            bool average_log_prob) {
    using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                         int64_t, bool, bool);
    static const auto op = find_op<Signature>("simpo_ext::sequence_logps");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [logps, counts] =
        op.call(token_logps, labels, options.ignore_index, options.shift, average_log_prob);
    ctx->save_for_backward({labels, counts});
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["shift"] = options.shift;
    ctx->saved_data["average"] = average_log_prob;
    return logps;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Signature =
        at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool, bool);
    static const auto op = find_op<Signature>("simpo_ext::sequence_logps_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], saved[1], ctx->saved_data["ignore_index"].toInt(),
                    ctx->saved_data["shift"].toBool(), ctx->saved_data["average"].toBool()),
            at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

struct PreferenceLoss : torch::autograd::Function<PreferenceLoss> {
  // loss, losses, logps [2P], rewards [2P], sft_loss, metrics
  static variable_list forward(AutogradContext* ctx, const at::Tensor& token_logps,
                               const at::Tensor& labels, const SimPOOptions& options,
                               double gamma_beta_ratio) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                 at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, int64_t, bool, bool, double, double, int64_t, double,
        double, int64_t, int64_t, int64_t);
    static const auto op = find_op<Signature>("simpo_ext::preference_loss");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, losses, logps, rewards, sft_loss, metrics, slopes, counts] =
        op.call(token_logps, labels, options.tokens.ignore_index, options.tokens.shift,
                options.average_log_prob, options.beta, gamma_beta_ratio,
                static_cast<int64_t>(options.loss_type), options.label_smoothing,
                options.sft_weight, static_cast<int64_t>(options.sft_reduction),
                static_cast<int64_t>(options.reduction), static_cast<int64_t>(options.empty));
    ctx->save_for_backward({labels, slopes, counts});
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({rewards, metrics});
    ctx->saved_data["ignore_index"] = options.tokens.ignore_index;
    ctx->saved_data["shift"] = options.tokens.shift;
    ctx->saved_data["average"] = options.average_log_prob;
    ctx->saved_data["sft_weight"] = options.sft_weight;
    ctx->saved_data["sft_reduction"] = static_cast<int64_t>(options.sft_reduction);
    ctx->saved_data["reduction"] = static_cast<int64_t>(options.reduction);
    ctx->saved_data["empty"] = static_cast<int64_t>(options.empty);
    return {loss, losses, logps, rewards, sft_loss, metrics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Optional = const std::optional<at::Tensor>&;
    using Signature =
        at::Tensor(Optional, Optional, Optional, Optional, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, int64_t, bool, bool, double, int64_t, int64_t, int64_t);
    static const auto op = find_op<Signature>("simpo_ext::preference_loss_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const auto gradient = [&](size_t output) {
      return grads[output].defined() ? std::optional<at::Tensor>(grads[output]) : std::nullopt;
    };
    auto& data = ctx->saved_data;
    return {
        op.call(gradient(0), gradient(1), gradient(2), gradient(4), saved[0], saved[1], saved[2],
                data["ignore_index"].toInt(), data["shift"].toBool(), data["average"].toBool(),
                data["sft_weight"].toDouble(), data["sft_reduction"].toInt(),
                data["reduction"].toInt(), data["empty"].toInt()),
        at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

inline void check_number(const char* name, double value, bool in_range, const char* expected) {
  TORCH_CHECK_VALUE(std::isfinite(value) && in_range, name, ": expected ", expected, ", got ",
                    value);
}

inline void check_tensor(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), name, ": expected a tensor, got an undefined one");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, ": expected a dense tensor, got layout ",
                   tensor.layout());
  TORCH_CHECK(tensor.device().is_cpu() || tensor.device().is_cuda(), name,
              ": simpo_ext has kernels for CPU and CUDA tensors, got a tensor on ", tensor.device(),
              "; move it with .cpu()");
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

inline void check_token_arguments(const at::Tensor& logits, const at::Tensor& labels,
                                  const TokenLogpsOptions& options) {
  check_tensor("logits", logits);
  check_tensor("labels", labels);
  const at::ScalarType dtype = logits.scalar_type(), label_dtype = labels.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "logits: expected dtype float64, float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_TYPE(
      label_dtype == at::kLong || label_dtype == at::kInt || label_dtype == at::kShort ||
          label_dtype == at::kChar || label_dtype == at::kByte,
      "labels: expected an integer dtype (int64, int32, int16, int8, uint8), got ", label_dtype);
  TORCH_CHECK_VALUE(logits.dim() == 3, "logits: expected shape [B, T, V], got ", logits.sizes());
  TORCH_CHECK_VALUE(
      labels.dim() == 2 && labels.size(0) == logits.size(0) && labels.size(1) == logits.size(1),
      "labels: expected shape [B, T] as of logits ", logits.sizes(), ", got ", labels.sizes());
  check_number("logit_scale", options.logit_scale, options.logit_scale >= 1e-30,
               "a finite number >= 1e-30");
  if (options.softcap.has_value()) {
    check_number("softcap", *options.softcap, *options.softcap >= 1e-30 && *options.softcap <= 1e30,
                 "a number in [1e-30, 1e30]");
  }
  if (options.inplace_backward) check_inplace_backward(logits);
}

// The ratio gamma / beta.
inline double check_simpo_options(const SimPOOptions& options) {
  check_number("beta", options.beta, options.beta > 0.0, "a finite number > 0");
  check_number("label_smoothing", options.label_smoothing,
               options.label_smoothing >= 0.0 && options.label_smoothing <= 0.5,
               "a number in [0, 0.5]");
  TORCH_CHECK_VALUE(options.loss_type != LossType::kHinge || options.label_smoothing == 0.0,
                    "label_smoothing: expected 0 with the hinge loss, got ",
                    options.label_smoothing);
  check_number("sft_weight", options.sft_weight, options.sft_weight >= 0.0, "a finite number >= 0");
  TORCH_CHECK_VALUE(!(options.gamma.has_value() && options.gamma_beta_ratio.has_value()),
                    "gamma, gamma_beta_ratio: expected at most one of the two, got both");
  const bool token_wise_sft = options.sft_reduction == SftReduction::kToken;
  TORCH_CHECK_VALUE(!(token_wise_sft && options.reduction == Reduction::kNone),
                    "sft_reduction: expected kSequence with Reduction::kNone, got kToken");
  for (const auto& normalizer : {options.pair_normalizer, options.token_normalizer}) {
    if (!normalizer.has_value()) continue;
    TORCH_CHECK_VALUE(options.reduction == Reduction::kMean,
                      "normalizer: expected none without Reduction::kMean, got ", *normalizer);
    check_number("normalizer", *normalizer, *normalizer > 0.0, "a finite number > 0");
  }
  TORCH_CHECK_VALUE(options.pair_normalizer.has_value() || !options.token_normalizer.has_value(),
                    "token_normalizer: expected a pair_normalizer beside it, got ",
                    options.token_normalizer.value_or(0.0), " alone");
  TORCH_CHECK_VALUE(
      !token_wise_sft ||
          options.token_normalizer.has_value() == options.pair_normalizer.has_value(),
      "token_normalizer: expected one beside pair_normalizer with SftReduction::kToken, got none");
  const double ratio = options.gamma.has_value() ? *options.gamma / options.beta
                                                 : options.gamma_beta_ratio.value_or(0.5);
  check_number("gamma_beta_ratio", ratio, true, "a finite number");
  return ratio;
}

}  // namespace detail

// logits [B, T, V], labels [B, T] -> [B, T]; 0 at masked positions.
inline at::Tensor token_logps(const at::Tensor& logits, const at::Tensor& labels,
                              const TokenLogpsOptions& options = {}) {
  detail::check_token_arguments(logits, labels, options);
  return detail::TokenLogps::apply(logits, labels.to(at::kLong), options);
}

// logits [B, T, V], labels [B, T] -> [B]: mean or sum over valid tokens; NaN for an empty sequence.
inline at::Tensor sequence_logps(const at::Tensor& logits, const at::Tensor& labels,
                                 bool average_log_prob = true,
                                 const TokenLogpsOptions& options = {}) {
  const at::Tensor logps = token_logps(logits, labels, options);
  return detail::SequenceLogps::apply(logps, labels.to(at::kLong), options, average_log_prob);
}

// logits [2P, T, V], labels [2P, T].
inline SimPOOutput simpo_loss(const at::Tensor& logits, const at::Tensor& labels,
                              const SimPOOptions& options = {}) {
  detail::check_token_arguments(logits, labels, options.tokens);
  TORCH_CHECK_VALUE(logits.size(0) % 2 == 0,
                    "logits: expected an even B (P chosen rows, then P rejected rows), got ",
                    logits.size(0));
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const at::Tensor long_labels = labels.to(at::kLong);
  const at::Tensor logps = detail::TokenLogps::apply(logits, long_labels, options.tokens);
  SimPOOptions op_options = options;
  if (options.pair_normalizer.has_value()) {  // sums, to be divided here
    op_options.reduction = Reduction::kSum;
    op_options.sft_weight = 0.0;
  }
  torch::autograd::variable_list out =
      detail::PreferenceLoss::apply(logps, long_labels, op_options, gamma_beta_ratio);
  if (options.pair_normalizer.has_value()) {
    const double pairs = *options.pair_normalizer;
    const bool by_token = options.sft_reduction == SftReduction::kToken;
    out[0] = out[0] / pairs;
    out[4] = out[4] / (by_token ? *options.token_normalizer : pairs);
    if (options.sft_weight > 0.0) out[0] = out[0] + options.sft_weight * out[4];
  }
  const int64_t P = logits.size(0) / 2;
  return {
      .loss = out[0],
      .losses = out[1],
      .chosen_logps = out[2].narrow(0, 0, P),
      .rejected_logps = out[2].narrow(0, P, P),
      .chosen_rewards = out[3].narrow(0, 0, P),
      .rejected_rewards = out[3].narrow(0, P, P),
      .sft_loss = out[4],
      .metrics = out[5],
  };
}

}  // namespace simpo_ext
