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

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
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

constexpr int64_t kDefaultLogitsBudgetBytes = int64_t{1} << 30;

// Of the losses from hidden states; inplace_backward is without effect there.
struct LinearOptions {
  std::optional<at::Tensor> bias{};  // [V]
  // How much of the logits is held at a time; what is not kept for the backward is computed again.
  int64_t logits_budget_bytes = kDefaultLogitsBudgetBytes;
  // An upper bound. On a GPU, the count waits for the device where it is not given, which a stream
  // that is being captured forbids.
  std::optional<int64_t> num_valid_tokens{};
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

// Calls an op. What leaves the library as a standard exception, torch may have made an error of its
// own, whose type does not tell what was wrong.
template <typename Call>
auto with_argument_errors(const Call& call) {
  try {
    return call();
  } catch (const std::exception& error) {
    const std::string message = error.what(), first_line = message.substr(0, message.find('\n'));
    TORCH_CHECK_INDEX(message.find("is out of range") == std::string::npos, first_line);
    TORCH_CHECK_VALUE(message.find("num_valid_tokens: ") == std::string::npos, first_line);
    throw;
  }
}

struct TokenLogps : torch::autograd::Function<TokenLogps> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits,
                            const at::Tensor& labels, const TokenLogpsOptions& options) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, int64_t, bool, double, double);
    static const auto op = find_op<Signature>("simpo_ext::token_logps");
    // Below autograd: Python may have registered a formula of its own for the op.
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [logps, max, sum_exp] = with_argument_errors([&] {
      return op.call(logits, labels, options.ignore_index, options.shift, options.logit_scale,
                     softcap_or_zero(options));
    });
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

struct LinearTokenLogps : torch::autograd::Function<LinearTokenLogps> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& labels, const TokenLogpsOptions& options,
                            int64_t logits_budget_bytes, int64_t num_valid_tokens) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
        int64_t, bool, double, double, int64_t, c10::SymInt);
    static const auto op = find_op<Signature>("simpo_ext::linear_token_logps");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [logps, max, sum_exp, kept_logits] = with_argument_errors([&] {
      return op.call(hidden, weight, bias, labels, options.ignore_index, options.shift,
                     options.logit_scale, softcap_or_zero(options), logits_budget_bytes,
                     num_valid_tokens);
    });
    ctx->save_for_backward(
        {hidden, weight, bias.value_or(at::Tensor()), labels, max, sum_exp, kept_logits});
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["shift"] = options.shift;
    ctx->saved_data["logit_scale"] = options.logit_scale;
    ctx->saved_data["softcap"] = softcap_or_zero(options);
    return logps;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool,
        double, double, bool, bool, bool);
    static const auto op = find_op<Signature>("simpo_ext::linear_token_logps_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    const auto bias = saved[2].defined() ? std::optional<at::Tensor>(saved[2]) : std::nullopt;
    std::array<bool, 3> needs{};  // hidden, weight, bias
    for (size_t i = 0; i < needs.size(); ++i) {
      needs[i] = saved[i].defined() && ctx->needs_input_grad(i);
    }
    auto& data = ctx->saved_data;
    auto [dhidden, dweight, dbias] = op.call(
        grads[0], saved[0], saved[1], bias, saved[3], saved[4], saved[5], saved[6],
        data["ignore_index"].toInt(), data["shift"].toBool(), data["logit_scale"].toDouble(),
        data["softcap"].toDouble(), needs[0], needs[1], needs[2]);
    variable_list result(8);
    if (needs[0]) result[0] = dhidden;
    if (needs[1]) result[1] = dweight;
    if (needs[2]) result[2] = dbias;
    return result;
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
  TORCH_CHECK_VALUE(tensor.device() == hidden.device(), name, ": expected device ", hidden.device(),
                    " as of hidden, got ", tensor.device());
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
  TORCH_CHECK_VALUE(linear.logits_budget_bytes >= 0,
                    "logits_budget_bytes: expected 0 or more, got ", linear.logits_budget_bytes);
  TORCH_CHECK_VALUE(linear.num_valid_tokens.value_or(0) >= 0,
                    "num_valid_tokens: expected 0 or more, got ",
                    linear.num_valid_tokens.value_or(0));
}

// As torch casts the arguments of linear.
inline at::Tensor autocast(const at::Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

// What goes into the products, and how they are worked on.
struct LinearInputs {
  at::Tensor hidden, weight;
  std::optional<at::Tensor> bias;
  int64_t logits_budget_bytes;
  int64_t rows;  // an upper bound of the number of valid tokens
};

// Of arguments whose shapes have been checked; labels are int64.
inline LinearInputs linear_inputs(const at::Tensor& hidden, const at::Tensor& weight,
                                  const at::Tensor& labels, const TokenLogpsOptions& options,
                                  const LinearOptions& linear) {
  const at::Tensor x = autocast(hidden), w = autocast(weight);
  const auto b =
      linear.bias.has_value() ? std::optional<at::Tensor>(autocast(*linear.bias)) : std::nullopt;
  check_factor("weight", w, x);
  if (b.has_value()) check_factor("bias", *b, x);
  TORCH_CHECK_VALUE(labels.device() == x.device(), "labels: expected device ", x.device(),
                    " as of hidden, got ", labels.device());
  const bool needs_gradient =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || w.requires_grad() || (b.has_value() && b->requires_grad()));
  const at::Tensor scored = options.shift ? labels.slice(1, 1) : labels;
  const int64_t rows = linear.num_valid_tokens.has_value()
                           ? std::min(*linear.num_valid_tokens, scored.numel())
                           : scored.ne(options.ignore_index).sum().item<int64_t>();
  return {x, w, b, needs_gradient ? linear.logits_budget_bytes : int64_t{0}, rows};
}

inline at::Tensor linear_token_logps(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels, const TokenLogpsOptions& options,
                                     const LinearOptions& linear) {
  const LinearInputs in = linear_inputs(hidden, weight, labels, options, linear);
  return LinearTokenLogps::apply(in.hidden, in.weight, in.bias, labels, options,
                                 in.logits_budget_bytes, in.rows);
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

// B = 2P.
inline void check_even_batch(const char* name, const at::Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.size(0) % 2 == 0, name,
                    ": expected an even B (P chosen rows, then P rejected rows), got ",
                    tokens.size(0));
}

// token_logps [2P, T], labels [2P, T] int64.
inline SimPOOutput loss_of_token_logps(const at::Tensor& logps, const at::Tensor& labels,
                                       const SimPOOptions& options, double gamma_beta_ratio) {
  SimPOOptions op_options = options;
  if (options.pair_normalizer.has_value()) {  // sums, to be divided here
    op_options.reduction = Reduction::kSum;
    op_options.sft_weight = 0.0;
  }
  variable_list out = PreferenceLoss::apply(logps, labels, op_options, gamma_beta_ratio);
  if (options.pair_normalizer.has_value()) {
    const double pairs = *options.pair_normalizer;
    const bool by_token = options.sft_reduction == SftReduction::kToken;
    out[0] = out[0] / pairs;
    out[4] = out[4] / (by_token ? *options.token_normalizer : pairs);
    if (options.sft_weight > 0.0) out[0] = out[0] + options.sft_weight * out[4];
  }
  const int64_t P = logps.size(0) / 2;
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

// hidden [B, T, H], weight [V, H], labels [B, T] -> [B, T]: token_logps of hidden weight^T + bias,
// which is never all in memory.
inline at::Tensor linear_token_logps(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels,
                                     const TokenLogpsOptions& options = {},
                                     const LinearOptions& linear = {}) {
  detail::check_linear_shapes(hidden, weight, labels, linear);
  detail::check_token_options(options);
  return detail::linear_token_logps(hidden, weight, labels.to(at::kLong), options, linear);
}

// logits [2P, T, V], labels [2P, T].
inline SimPOOutput simpo_loss(const at::Tensor& logits, const at::Tensor& labels,
                              const SimPOOptions& options = {}) {
  detail::check_token_arguments(logits, labels, options.tokens);
  detail::check_even_batch("logits", logits);
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const at::Tensor long_labels = labels.to(at::kLong);
  const at::Tensor logps = detail::TokenLogps::apply(logits, long_labels, options.tokens);
  return detail::loss_of_token_logps(logps, long_labels, options, gamma_beta_ratio);
}

// hidden [2P, T, H], weight [V, H], labels [2P, T]: simpo_loss of hidden weight^T + bias, which is
// never all in memory.
inline SimPOOutput linear_simpo_loss(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels, const SimPOOptions& options = {},
                                     const LinearOptions& linear = {}) {
  detail::check_linear_shapes(hidden, weight, labels, linear);
  detail::check_token_options(options.tokens);
  detail::check_even_batch("hidden", hidden);
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const at::Tensor long_labels = labels.to(at::kLong);
  const at::Tensor logps =
      detail::linear_token_logps(hidden, weight, long_labels, options.tokens, linear);
  return detail::loss_of_token_logps(logps, long_labels, options, gamma_beta_ratio);
}

}  // namespace simpo_ext
