// SimPO for C++ programs that use libtorch: at::Tensor in, at::Tensor out, with autograd.
//
//   find_package(Torch REQUIRED)
//   find_package(simpo_ext REQUIRED)
//   target_link_libraries(app PRIVATE simpo_ext::simpo_ext)
//
// Header-only and compiled against the includer's libtorch. The compiled library is reached through
// the dispatcher alone, so it needs no libtorch of the same version. Formulas, defaults and edge
// cases are those of the Python function of the same name; B = 2P sequences, chosen rows first,
// where no Layout says otherwise.
//
// Errors are c10::TypeError, c10::ValueError, c10::IndexError (of CPU tensors, a label out of range
// or a pair of sequences that are not there; on a GPU it becomes NaN) and, for a device without
// kernels and a double backward, c10::Error.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "simpo_ext/detail/autograd.h"
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
    const double pairs = *options.pair_normalizer;
    const bool by_token = options.sft_reduction == SftReduction::kToken;
    out[0] = out[0] / pairs;
    out[4] = out[4] / (by_token ? *options.token_normalizer : pairs);
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

}  // namespace detail

// logits [B, T, V], labels [B, T] -> [B, T]; 0 at masked positions. Packed: [N, V] and [N] -> [N].
inline at::Tensor token_logps(const at::Tensor& logits, const at::Tensor& labels,
                              const TokenLogpsOptions& options = {}, const Layout& layout = {}) {
  const auto batch = detail::as_batch("logits", logits, labels, layout, 1, false, options.shift);
  detail::check_token_arguments(batch.tokens, batch.labels, options);
  const auto [targets, aligned] = detail::align(batch, batch.tokens.size(2), options);
  return detail::TokenLogps::apply(batch.tokens, targets, aligned).view(labels.sizes());
}

// logits [B, T, V], labels [B, T] -> [B]: mean or sum over valid tokens; NaN for an empty sequence.
// Packed: [N, V] and [N] -> [S].
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

// hidden [B, T, H], weight [V, H], labels [B, T] -> [B, T]: token_logps of hidden weight^T + bias,
// which is never all in memory. Packed: [N, H] and [N] -> [N].
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

// logits [2P, T, V], labels [2P, T]; packed: [N, V] and [N].
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

// hidden [2P, T, H], weight [V, H], labels [2P, T]: simpo_loss of hidden weight^T + bias, which is
// never all in memory. Packed: [N, H] and [N].
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

// token_logps [2P, T] float32 or float64, labels [2P, T]: simpo_loss from what token_logps returns,
// wherever it comes from; labels only say where a token is scored. Packed: [N] and [N].
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
  SimPOOptions of_validity = options;
  of_validity.tokens.ignore_index = 0;
  const at::Tensor valid = batch.labels.to(at::kLong).ne(options.tokens.ignore_index);
  const at::Tensor targets =
      detail::aligned_targets(valid.to(at::kLong), batch.layout.cu_seqlens, 2, of_validity.tokens);
  return detail::loss_of_token_logps(batch.tokens, targets, batch, of_validity, gamma_beta_ratio);
}

}  // namespace simpo_ext
