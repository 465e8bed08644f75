// SimPO for C++ programs that use libtorch: at::Tensor in, at::Tensor out, with autograd.
//
//   find_package(Torch REQUIRED)
//   find_package(simpo_ext REQUIRED)
//   target_link_libraries(app PRIVATE simpo_ext::simpo_ext)
//
// Header-only and compiled against the includer's libtorch. Tensors reach the compiled library only
// through the dispatcher, so the library does not need the same version of libtorch. Formulas,
// defaults and edge cases are those of the Python function of the same name.
//
// Arguments, unless a function describes them:
//
//   logits  [B, T, V] float64, float32, bfloat16 or float16, with any strides. Logits whose
//           vocabulary is not contiguous are copied. Packed (see Layout): [N, V] or [1, N, V].
//   hidden  [B, T, H] of the same dtypes: the last hidden states, the input of lm_head. Packed:
//           [N, H] or [1, N, H].
//   weight  [V, H] of hidden's dtype: the weight of lm_head. Under autocast, hidden, weight and
//           bias are cast to its dtype unless they are float64.
//   labels  [B, T] int64, int32, int16, int8 or uint8, each ignore_index or in [0, V). Packed:
//           [N] or [1, N].
//
// Functions of pairs take B = 2P rows, P chosen ones followed by P rejected ones, unless a Layout
// is given. Results are float32, or float64 for float64 arguments. Logits, hidden states and
// log-probabilities of masked positions are never read, and their gradient is 0. The result of a
// valid position is NaN if its logits contain NaN or +inf, or are all -inf.
//
// Errors have the name of the argument, the expectation and the value. The functions throw before
// they write anything:
//
//   c10::TypeError   a tensor is undefined, not dense, or has the wrong dtype
//   c10::ValueError  a shape, a device, a number or a combination does not fit; on CPUs also
//                    cu_seqlens that decrease or leave [0, N]
//   c10::IndexError  on CPUs, a label that is out of range, or a pair with a sequence that does not
//                    exist. On a GPU, the host does not wait to check: the log-probability or the
//                    loss becomes NaN
//   c10::Error       the base class of these; thrown itself if there are no kernels for the device,
//                    if another copy of the library was loaded first, or for a second derivative
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "simpo_ext/detail/autograd.h"
#include "simpo_ext/detail/budget.h"
#include "simpo_ext/detail/checks.h"
#include "simpo_ext/detail/layout.h"
#include "simpo_ext/options.h"

namespace simpo_ext {
namespace detail {

// Casts a tensor as torch casts the arguments of linear.
inline at::Tensor autocast(const at::Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

// The factors of the matrix products, and the memory for them.
struct LinearInputs {
  at::Tensor hidden, weight;
  std::optional<at::Tensor> bias;
  int64_t logits_budget_bytes;
  int64_t rows;  // an upper bound of the number of valid tokens
};

// The shapes must have been checked. labels are int64.
inline LinearInputs linear_inputs(const at::Tensor& hidden, const at::Tensor& weight,
                                  const at::Tensor& labels, const TokenLogpsOptions& options,
                                  const LinearOptions& linear) {
  const at::Tensor x = autocast(hidden), w = autocast(weight);
  const auto b =
      linear.bias.has_value() ? std::optional<at::Tensor>(autocast(*linear.bias)) : std::nullopt;
  check_factor("weight", w, x);
  if (b.has_value()) check_factor("bias", *b, x);
  const bool needs_gradient =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || w.requires_grad() || (b.has_value() && b->requires_grad()));
  const at::Tensor scored = options.shift ? labels.slice(1, 1) : labels;
  const int64_t rows = linear.num_valid_tokens.has_value()
                           ? std::min(*linear.num_valid_tokens, scored.numel())
                           : scored.ne(options.ignore_index).sum().item<int64_t>();
  int64_t budget = 0;  // without a backward, no logits are kept
  if (needs_gradient) {
    budget = linear.logits_budget_bytes.has_value() ? *linear.logits_budget_bytes
                                                    : default_logits_budget_bytes(x.device());
  }
  return {x, w, b, budget, rows};
}

inline at::Tensor linear_token_logps(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels, const TokenLogpsOptions& options,
                                     const LinearOptions& linear) {
  const LinearInputs in = linear_inputs(hidden, weight, labels, options, linear);
  return LinearTokenLogps::apply(in.hidden, in.weight, in.bias, labels, options,
                                 in.logits_budget_bytes, in.rows);
}

inline at::Tensor divided(const at::Tensor& sum, const Normalizer& by) {
  if (const double* number = by.number()) return sum / *number;
  return (sum / *by.tensor()).to(sum.scalar_type());
}

// token_logps [B, T], targets [B, T] int64.
inline SimPOOutput loss_of_token_logps(const at::Tensor& logps, const at::Tensor& targets,
                                       const Batch& batch, const SimPOOptions& options,
                                       double gamma_beta_ratio) {
  SimPOOptions op_options = options;
  op_options.tokens.shift = batch.shift;
  if (options.pair_normalizer.has_value()) {  // the op returns sums, which are divided below
    op_options.reduction = Reduction::kSum;
    op_options.sft_weight = 0.0;
  }
  variable_list out =
      PreferenceLoss::apply(logps, targets, batch.layout, op_options, gamma_beta_ratio);
  if (options.pair_normalizer.has_value()) {
    const bool by_token = options.sft_reduction == SftReduction::kToken;
    out[0] = divided(out[0], *options.pair_normalizer);
    out[4] = divided(out[4], by_token ? *options.token_normalizer : *options.pair_normalizer);
    if (options.sft_weight > 0.0) out[0] = out[0] + options.sft_weight * out[4];
  }
  const int64_t P = out[1].size(0);
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

// Targets that are 0 at masked positions and 1 at all others, and the options that fit them. The
// values of the labels do not matter.
inline std::pair<at::Tensor, SimPOOptions> validity(const Batch& batch, SimPOOptions options) {
  const at::Tensor valid = batch.labels.to(at::kLong).ne(options.tokens.ignore_index);
  options.tokens.ignore_index = 0;
  return {aligned_targets(valid.to(at::kLong), batch.layout.cu_seqlens, 2, options.tokens),
          options};
}

}  // namespace detail

// Log-probability of each label: log_softmax(z)[label], where z are the logits after logit_scale
// and softcap. The only allocation as large as the logits is their gradient.
//
// Returns a tensor of the labels' shape, with each value at the position of its logits; 0 at masked
// positions.
inline at::Tensor token_logps(const at::Tensor& logits, const at::Tensor& labels,
                              const TokenLogpsOptions& options = {}, const Layout& layout = {}) {
  const auto batch = detail::as_batch("logits", logits, labels, layout, 1, false, options.shift);
  detail::check_token_arguments(batch.tokens, batch.labels, options);
  const auto [targets, aligned] = detail::align(batch, batch.tokens.size(2), options);
  return detail::TokenLogps::apply(batch.tokens, targets, aligned).view(labels.sizes());
}

// Log-probability of each sequence: the mean over its valid tokens (average_log_prob), as in SimPO,
// or the sum. Uses only cu_seqlens of the layout.
//
// Returns [B], packed [S]. A sequence without a valid token is NaN, not 0, which would be the
// highest possible log-probability.
inline at::Tensor sequence_logps(const at::Tensor& logits, const at::Tensor& labels,
                                 bool average_log_prob = true,
                                 const TokenLogpsOptions& options = {}, const Layout& layout = {}) {
  const auto batch = detail::as_batch("logits", logits, labels, layout, 1, false, options.shift);
  detail::check_token_arguments(batch.tokens, batch.labels, options);
  const auto [targets, aligned] = detail::align(batch, batch.tokens.size(2), options);
  const at::Tensor logps = detail::TokenLogps::apply(batch.tokens, targets, aligned);
  return detail::SequenceLogps::apply(logps, targets, batch.layout.cu_seqlens, aligned,
                                      average_log_prob);
}

// token_logps of logits = hidden weight^T + bias, rounded to hidden's dtype. The logits are never
// all in memory: only valid positions are multiplied, one chunk of the vocabulary after another.
// hidden, weight and bias get a gradient if they require one.
//
// Returns a tensor of the labels' shape, with each value at the position of its hidden state; 0 at
// masked positions.
inline at::Tensor linear_token_logps(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels,
                                     const TokenLogpsOptions& options = {},
                                     const LinearOptions& linear = {}, const Layout& layout = {}) {
  const auto batch = detail::as_batch("hidden", hidden, labels, layout, 1, false, options.shift);
  detail::check_linear_shapes(batch.tokens, weight, batch.labels, linear);
  detail::check_token_options(options);
  const auto [targets, aligned] = detail::align(batch, weight.size(0), options);
  return detail::linear_token_logps(batch.tokens, weight, targets, aligned, linear)
      .view(labels.sizes());
}

// SimPO's loss from the logits of chosen and rejected completions. With l the mean (or sum) of a
// completion's token log-probabilities, the loss of each pair is
//
//   r = l, or, with an alpha, (1 - exp(l)^-alpha) / alpha
//   z = (r_chosen - r_rejected) - gamma_beta_ratio
//   sigmoid: -logsigmoid(beta z) (1 - label_smoothing) - logsigmoid(-beta z) label_smoothing
//   hinge:   relu(1 - beta z)
//   ipo:     (z - 1 / (2 beta))^2
//
// and loss = reduce(losses) + sft_weight * sft_loss. Source: SimPO, arXiv 2405.14734, eq. 6. The
// documentation of Python's simpo_loss has the sources of the variants.
inline SimPOOutput simpo_loss(const at::Tensor& logits, const at::Tensor& labels,
                              const SimPOOptions& options = {}, const Layout& layout = {}) {
  const auto batch =
      detail::as_batch("logits", logits, labels, layout, 1, true, options.tokens.shift);
  detail::check_token_arguments(batch.tokens, batch.labels, options.tokens);
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const auto [targets, aligned] = detail::align(batch, batch.tokens.size(2), options.tokens);
  const at::Tensor logps = detail::TokenLogps::apply(batch.tokens, targets, aligned);
  return detail::loss_of_token_logps(logps, targets, batch, options, gamma_beta_ratio);
}

// simpo_loss of logits = hidden weight^T + bias, which are never all in memory, as in
// linear_token_logps.
inline SimPOOutput linear_simpo_loss(const at::Tensor& hidden, const at::Tensor& weight,
                                     const at::Tensor& labels, const SimPOOptions& options = {},
                                     const LinearOptions& linear = {}, const Layout& layout = {}) {
  const auto batch =
      detail::as_batch("hidden", hidden, labels, layout, 1, true, options.tokens.shift);
  detail::check_linear_shapes(batch.tokens, weight, batch.labels, linear);
  detail::check_token_options(options.tokens);
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const auto [targets, aligned] = detail::align(batch, weight.size(0), options.tokens);
  const at::Tensor logps =
      detail::linear_token_logps(batch.tokens, weight, targets, aligned, linear);
  return detail::loss_of_token_logps(logps, targets, batch, options, gamma_beta_ratio);
}

// simpo_loss from token log-probabilities [2P, T] float32 or float64, packed [N] or [1, N], as
// token_logps returns them. labels have the same shape, and only show which positions are masked.
// Uses only ignore_index and shift of options.tokens.
inline SimPOOutput simpo_loss_from_token_logps(const at::Tensor& token_logps,
                                               const at::Tensor& labels,
                                               const SimPOOptions& options = {},
                                               const Layout& layout = {}) {
  const auto batch =
      detail::as_batch("token_logps", token_logps, labels, layout, 0, true, options.tokens.shift);
  const at::ScalarType dtype = batch.tokens.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "token_logps: expected dtype float32 or float64, got ", dtype);
  detail::check_labels(batch.labels, "token_logps", batch.tokens);
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const auto [targets, of_validity] = detail::validity(batch, options);
  return detail::loss_of_token_logps(batch.tokens, targets, batch, of_validity, gamma_beta_ratio);
}

// simpo_loss from sequence log-probabilities, usually means over tokens: chosen_logps and
// rejected_logps [P] of any of logits' dtypes, and pair_weight [P] as in Layout. Each counts as a
// sequence of one token, also in the metrics and in a token-wise SFT term. average_log_prob, empty
// and tokens have no effect. The results are float64 if either argument is.
inline SimPOOutput simpo_loss_from_logps(const at::Tensor& chosen_logps,
                                         const at::Tensor& rejected_logps,
                                         const SimPOOptions& options = {},
                                         const std::optional<at::Tensor>& pair_weight = {}) {
  detail::check_floating("chosen_logps", chosen_logps);
  detail::check_floating("rejected_logps", rejected_logps);
  TORCH_CHECK_VALUE(chosen_logps.dim() == 1, "chosen_logps: expected shape [P], got ",
                    chosen_logps.sizes());
  TORCH_CHECK_VALUE(rejected_logps.sizes() == chosen_logps.sizes(),
                    "rejected_logps: expected shape ", chosen_logps.sizes(),
                    " to match chosen_logps, got ", rejected_logps.sizes());
  detail::check_same_device("rejected_logps", rejected_logps, "chosen_logps", chosen_logps);
  const double gamma_beta_ratio = detail::check_simpo_options(options);
  const bool is_double =
      chosen_logps.scalar_type() == at::kDouble || rejected_logps.scalar_type() == at::kDouble;
  const at::ScalarType dtype = is_double ? at::kDouble : at::kFloat;
  const at::Tensor logps =
      at::cat({chosen_logps.to(dtype), rejected_logps.to(dtype)}).unsqueeze(1);  // [2P, 1]
  const at::Tensor labels = at::zeros_like(logps, at::kLong);
  const auto batch = detail::as_batch("chosen_logps", logps, labels, {.pair_weight = pair_weight},
                                      0, true, /*shift=*/false);
  SimPOOptions of_sequences = options;
  of_sequences.tokens = {};
  return detail::loss_of_token_logps(logps, labels, batch, of_sequences, gamma_beta_ratio);
}

// The denominators of simpo_loss's mean for the same labels, options and layout. Only ignore_index,
// shift, empty, cu_seqlens and pairs matter. The values of the labels are not checked.
//
// For one optimizer step over several micro-batches or ranks, add up their counts and clamp the
// sums to at least 1. With these as pair_normalizer and token_normalizer, the gradients of the
// micro-batches and ranks add up to the gradient of the mean over the whole batch.
inline PairCounts count_pairs(const at::Tensor& labels, const SimPOOptions& options = {},
                              const Layout& layout = {}) {
  const Layout of_sequences{.cu_seqlens = layout.cu_seqlens, .pairs = layout.pairs};
  const auto batch =
      detail::as_batch("labels", labels, labels, of_sequences, 0, true, options.tokens.shift);
  detail::check_labels(batch.labels, "labels", batch.labels);
  // Lets the loss op count. With log-probabilities of -1, each chosen token of a counted pair adds
  // 1 to a token-wise SFT term.
  const auto [targets, counting] = detail::validity(
      batch,
      {.sft_reduction = SftReduction::kToken,
       .reduction = Reduction::kSum,
       .empty = options.empty,
       .tokens = {.ignore_index = options.tokens.ignore_index, .shift = options.tokens.shift}});
  const at::Tensor logps =
      at::full({}, -1.0, labels.options().dtype(at::kDouble)).expand(batch.labels.sizes());
  const SimPOOutput out = detail::loss_of_token_logps(logps, targets, batch, counting, 0.0);
  constexpr std::string_view kNumPairs = "num_pairs";
  const auto index = std::find(kMetricNames.begin(), kMetricNames.end(), kNumPairs);
  return {out.metrics.select(0, index - kMetricNames.begin()), out.sft_loss};
}

}  // namespace simpo_ext
