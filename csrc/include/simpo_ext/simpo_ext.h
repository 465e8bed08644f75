// SimPO for C++ programs that use libtorch: at::Tensor in, at::Tensor out, with autograd.
//
//   find_package(Torch REQUIRED)
//   find_package(simpo_ext REQUIRED)
//   target_link_libraries(app PRIVATE simpo_ext::simpo_ext)
//
// Header-only and compiled against the includer's libtorch. Tensors reach the compiled library
// through the dispatcher alone, so it needs no libtorch of the same version. Formulas, defaults and
// edge cases are those of the Python function of the same name.
//
// Arguments, where a function says nothing else:
//
//   logits  [B, T, V] float64, float32, bfloat16 or float16, of any strides, though a vocabulary
//           that is not contiguous is copied. Packed (see Layout): [N, V] or [1, N, V].
//   hidden  [B, T, H] of the same dtypes: the last hidden states, as they go into lm_head.
//           Packed: [N, H] or [1, N, H].
//   weight  [V, H] of hidden's dtype: lm_head's. Under autocast, hidden, weight and bias take its
//           dtype, unless they are float64.
//   labels  [B, T] int64, int32, int16, int8 or uint8, each ignore_index or in [0, V). Packed:
//           [N] or [1, N].
//
// Of pairs, B = 2P: P chosen rows, then P rejected ones, where no Layout says otherwise. Results
// are float32, float64 for float64 arguments. Logits, hidden states and log-probabilities of masked
// positions are never read, and their gradient is 0. A valid position whose logits hold NaN or
// +inf, or are all -inf, has a NaN result.
//
// Errors name argument, expectation and value, and come before anything is written:
//
//   c10::TypeError   a tensor is undefined, not dense, or of the wrong dtype
//   c10::ValueError  a shape, a device, a number or a combination does not fit; of CPU tensors,
//                    cu_seqlens that decrease or leave [0, N]
//   c10::IndexError  of CPU tensors, a label out of range, or a pair of sequences that are not
//                    there. On a GPU, which is not waited for, what it belongs to becomes NaN
//   c10::Error       the base of these; by itself: there are no kernels for the device, another
//                    copy of the library was loaded first, or a gradient was differentiated again
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "simpo_ext/detail/autograd.h"
#include "simpo_ext/detail/budget.h"
#include "simpo_ext/detail/checks.h"
#include "simpo_ext/detail/layout.h"
#include "simpo_ext/options.h"

namespace simpo_ext {
namespace detail {

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
  const bool needs_gradient =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || w.requires_grad() || (b.has_value() && b->requires_grad()));
  const at::Tensor scored = options.shift ? labels.slice(1, 1) : labels;
  const int64_t rows = linear.num_valid_tokens.has_value()
                           ? std::min(*linear.num_valid_tokens, scored.numel())
                           : scored.ne(options.ignore_index).sum().item<int64_t>();
  int64_t budget = 0;  // nothing is kept where no backward follows
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
  if (options.pair_normalizer.has_value()) {  // sums, to be divided here
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

// Targets that are 0 where nothing is scored and 1 elsewhere, whatever the labels are, and the
// options to score them with.
inline std::pair<at::Tensor, SimPOOptions> validity(const Batch& batch, SimPOOptions options) {
  const at::Tensor valid = batch.labels.to(at::kLong).ne(options.tokens.ignore_index);
  options.tokens.ignore_index = 0;
  return {aligned_targets(valid.to(at::kLong), batch.layout.cu_seqlens, 2, options.tokens),
          options};
}

}  // namespace detail

// Log-probability of each label: log_softmax(z)[label], z being the logits after logit_scale and
// softcap. Nothing of the logits' size is allocated but their gradient.
//
// Returns labels' shape, at the position of the logits; 0 where masked.
inline at::Tensor token_logps(const at::Tensor& logits, const at::Tensor& labels,
                              const TokenLogpsOptions& options = {}, const Layout& layout = {}) {
  const auto batch = detail::as_batch("logits", logits, labels, layout, 1, false, options.shift);
  detail::check_token_arguments(batch.tokens, batch.labels, options);
  const auto [targets, aligned] = detail::align(batch, batch.tokens.size(2), options);
  return detail::TokenLogps::apply(batch.tokens, targets, aligned).view(labels.sizes());
}

// Log-probability of each sequence: the mean of its valid tokens' (average_log_prob), which is
// SimPO's, or their sum. Of a layout, cu_seqlens alone counts.
//
// Returns [B], packed [S]; NaN for a sequence without a valid token: not 0, which would be the
// highest log-probability there is.
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

// token_logps of logits = hidden weight^T + bias, rounded to hidden's dtype, which are never all in
// memory: valid positions alone are multiplied, and the vocabulary is worked on in chunks.
// Gradients of hidden, weight and bias, those that are asked for.
//
// Returns labels' shape, at the position of the hidden state; 0 where masked.
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

// SimPO's loss from the logits of chosen and rejected completions. With l the mean (or sum)
// log-probability of a completion's valid tokens, of each pair
//
//   r = l, or, with an alpha, (1 - exp(l)^-alpha) / alpha
//   z = (r_chosen - r_rejected) - gamma_beta_ratio
//   sigmoid: -logsigmoid(beta z) (1 - label_smoothing) - logsigmoid(-beta z) label_smoothing
//   hinge:   relu(1 - beta z)
//   ipo:     (z - 1 / (2 beta))^2
//
// and loss = reduce(losses) + sft_weight * sft_loss. Source: SimPO, arXiv 2405.14734, eq. 6. Those
// of the variants: Python's simpo_loss.
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

// simpo_loss of logits = hidden weight^T + bias, which are never all in memory: see
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

// simpo_loss from what token_logps returns, wherever it comes from: token_logps [2P, T] float32 or
// float64, packed [N] or [1, N]. Of labels, of the same shape, it only counts where they are
// ignore_index; of options.tokens, ignore_index and shift.
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

// simpo_loss from sequence log-probabilities, chosen_logps and rejected_logps [P] of any of logits'
// dtypes, usually means over tokens, and pair_weight [P] as in Layout. Each counts as a sequence of
// one token, in the metrics and in a token-wise SFT term too; average_log_prob, empty and tokens
// are without effect. float64 if either is.
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
                    " as of chosen_logps, got ", rejected_logps.sizes());
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

// What the mean of simpo_loss divides by, given the same labels, options and layout, of which
// ignore_index, shift, empty, cu_seqlens and pairs matter. The labels' values are not checked.
//
// The counts of the micro-batches and ranks of an optimizer step, added up and clamped to 1 at
// least, are the pair_normalizer and the token_normalizer with which their gradients add up to that
// of the mean over the whole batch.
inline PairCounts count_pairs(const at::Tensor& labels, const SimPOOptions& options = {},
                              const Layout& layout = {}) {
  const Layout of_sequences{.cu_seqlens = layout.cu_seqlens, .pairs = layout.pairs};
  const auto batch =
      detail::as_batch("labels", labels, labels, of_sequences, 0, true, options.tokens.shift);
  detail::check_labels(batch.labels, "labels", batch.labels);
  // The SFT term of log-probabilities that are all -1: each chosen token of a counted pair adds 1.
  const auto [targets, counting] = detail::validity(
      batch,
      {.sft_reduction = SftReduction::kToken,
       .reduction = Reduction::kSum,
       .empty = options.empty,
       .tokens = {.ignore_index = options.tokens.ignore_index, .shift = options.tokens.shift}});
  const at::Tensor logps =
      at::full({}, -1.0, labels.options().dtype(at::kDouble)).expand(batch.labels.sizes());
  const SimPOOutput out = detail::loss_of_token_logps(logps, targets, batch, counting, 0.0);
  const int64_t num_pairs = 6;  // of kMetricNames
  return {out.metrics.select(0, num_pairs), out.sft_loss};
}

}  // namespace simpo_ext
