// The ops of the library as torch::autograd functions. The callers have checked the arguments.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "simpo_ext/build_info.h"
#include "simpo_ext/error_tags.h"
#include "simpo_ext/options.h"

namespace simpo_ext::detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The call into the library keeps it linked: the ops themselves are called through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  const char* error = simpo_ext_load_error();
  TORCH_CHECK(error == nullptr, error);
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline double softcap_or_zero(const TokenLogpsOptions& options) {
  return options.softcap.value_or(0.0);
}

// With create_graph, autograd would treat the gradient as a constant, and the second derivative
// would be wrong.
inline void refuse_double_backward() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "simpo_ext does not implement double backward: expected create_graph=false");
}

// The message after the tag in an error's text; nullopt if there is no tag. Torch may have put a
// backtrace into the lines below the message.
inline std::optional<std::string> message_after(std::string_view tag, std::string_view text) {
  const size_t begin = text.find(tag);
  if (begin == std::string_view::npos) return std::nullopt;
  const std::string_view message = text.substr(begin + tag.size());
  return std::string(message.substr(0, message.find('\n')));
}

// Calls an op. Rethrows an error with a tag as the class that the tag names.
template <typename Call>
auto with_argument_errors(const Call& call) {
  try {
    return call();
  } catch (const std::exception& error) {
    const auto index_error = message_after(kIndexErrorTag, error.what());
    TORCH_CHECK_INDEX(!index_error.has_value(), *index_error);
    const auto value_error = message_after(kValueErrorTag, error.what());
    TORCH_CHECK_VALUE(!value_error.has_value(), *value_error);
    throw;
  }
}

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct TokenLogps : torch::autograd::Function<TokenLogps> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits,
                            const at::Tensor& labels, const TokenLogpsOptions& options) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, int64_t, bool, double, double);
    static const auto op = find_op<Signature>("simpo_ext::token_logps");
    // Below autograd, because Python may have registered its own formula for the op.
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
      // A later backward that needs the old logits, including this node's, sees the new version and
      // throws.
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
    const OptionalTensor bias = if_defined(saved[2]);
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
                            const at::Tensor& labels, const OptionalTensor& cu_seqlens,
                            const TokenLogpsOptions& options, bool average_log_prob) {
    using Signature = std::tuple<at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, bool, bool);
    static const auto op = find_op<Signature>("simpo_ext::sequence_logps");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [logps, counts] = with_argument_errors([&] {
      return op.call(token_logps, labels, cu_seqlens, options.ignore_index, options.shift,
                     average_log_prob);
    });
    ctx->save_for_backward({labels, cu_seqlens.value_or(at::Tensor()), counts});
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["shift"] = options.shift;
    ctx->saved_data["average"] = average_log_prob;
    return logps;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                 const at::Tensor&, int64_t, bool, bool);
    static const auto op = find_op<Signature>("simpo_ext::sequence_logps_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(5);
    result[0] = op.call(grads[0], saved[0], if_defined(saved[1]), saved[2],
                        ctx->saved_data["ignore_index"].toInt(), ctx->saved_data["shift"].toBool(),
                        ctx->saved_data["average"].toBool());
    return result;
  }
};

struct PreferenceLoss : torch::autograd::Function<PreferenceLoss> {
  // loss, losses, logps [2P], rewards [2P], sft_loss, metrics
  static variable_list forward(AutogradContext* ctx, const at::Tensor& token_logps,
                               const at::Tensor& labels, const Layout& layout,
                               const SimPOOptions& options, double gamma_beta_ratio) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                 at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
        const OptionalTensor&, int64_t, bool, bool, double, double, int64_t, double, double, double,
        int64_t, int64_t, int64_t);
    static const auto op = find_op<Signature>("simpo_ext::preference_loss");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, losses, logps, rewards, sft_loss, metrics, slopes,
          counts] = with_argument_errors([&] {
      return op.call(token_logps, labels, layout.cu_seqlens, layout.pairs, layout.pair_weight,
                     options.tokens.ignore_index, options.tokens.shift, options.average_log_prob,
                     options.beta, gamma_beta_ratio, static_cast<int64_t>(options.loss_type),
                     options.label_smoothing, options.alpha, options.sft_weight,
                     static_cast<int64_t>(options.sft_reduction),
                     static_cast<int64_t>(options.reduction), static_cast<int64_t>(options.empty));
    });
    ctx->save_for_backward({labels, layout.cu_seqlens.value_or(at::Tensor()),
                            layout.pairs.value_or(at::Tensor()),
                            layout.pair_weight.value_or(at::Tensor()), slopes, counts});
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
    using Optional = const OptionalTensor&;
    using Signature = at::Tensor(Optional, Optional, Optional, Optional, const at::Tensor&,
                                 Optional, Optional, Optional, const at::Tensor&, const at::Tensor&,
                                 int64_t, bool, bool, double, int64_t, int64_t, int64_t);
    static const auto op = find_op<Signature>("simpo_ext::preference_loss_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    variable_list result(5);
    result[0] =
        op.call(if_defined(grads[0]), if_defined(grads[1]), if_defined(grads[2]),
                if_defined(grads[4]), saved[0], if_defined(saved[1]), if_defined(saved[2]),
                if_defined(saved[3]), saved[4], saved[5], data["ignore_index"].toInt(),
                data["shift"].toBool(), data["average"].toBool(), data["sft_weight"].toDouble(),
                data["sft_reduction"].toInt(), data["reduction"].toInt(), data["empty"].toInt());
    return result;
  }
};

}  // namespace simpo_ext::detail
