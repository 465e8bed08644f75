// The options and results of simpo_ext.h's functions. Letters in shapes: B rows, T positions, V
// vocabulary, H hidden size, N positions of a packed row, S sequences, P pairs.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace simpo_ext {

// Of z = r(chosen) - r(rejected) - gamma / beta; see simpo_loss.
enum class LossType : int64_t {
  kSigmoid = 0,  // -logsigmoid(beta z), or label-smoothed
  kHinge = 1,    // relu(1 - beta z), with subgradient 0 at the kink
  kIpo = 2,      // (z - 1 / (2 beta))^2
};

// Of the pairs' losses.
enum class Reduction : int64_t {
  kNone = 0,  // loss is [P]
  kMean = 1,  // over counted pairs (a token-wise SFT term: over their chosen tokens)
  kSum = 2,
};

// Of the SFT term.
enum class SftReduction : int64_t {
  kSequence = 0,  // -chosen_logps, reduced as the losses are
  kToken = 1,     // cross entropy over all valid chosen tokens of the batch; not with kNone
};

// What becomes of a pair with a completion that has no valid token.
enum class Empty : int64_t {
  // It adds nothing to loss, gradient and denominators, and is counted in the metrics; a batch of
  // nothing else has loss 0.
  kDrop = 0,
  kNan = 1,  // it makes the loss NaN
};

// How labels score logits.
struct TokenLogpsOptions {
  // The label of positions that are not scored, which are masked.
  int64_t ignore_index = -100;
  // True: the logits at t are scored with labels[:, t + 1], and the last position is masked, as
  // trainers of causal language models do. False: with labels[:, t].
  bool shift = true;
  // Factor on the logits, at least 1e-30.
  double logit_scale = 1.0;
  // Bound of the scaled logits, in [1e-30, 1e30]: softcap tanh(z / softcap) takes the place of z.
  std::optional<double> softcap{};
  // The backward overwrites the logits with their gradient, instead of allocating it. They must not
  // be a leaf that requires grad, nor a view of one, and their rows must lie apart in memory. A
  // later backward through anything that saved their values throws, a second one through this
  // function too.
  bool inplace_backward = false;
};

// Of the functions from hidden states, for which inplace_backward is without effect.
struct LinearOptions {
  // [V], of hidden's dtype and device: lm_head's.
  std::optional<at::Tensor> bias{};
  // How many bytes of logits are held at a time, >= 0, one chunk of the vocabulary at least; what
  // is not kept for the backward is computed again there. Default: default_logits_budget_bytes of
  // hidden's device, which is a sixteenth of a GPU's memory, and 1 GiB on CPUs.
  std::optional<int64_t> logits_budget_bytes{};
  // An upper bound of the number of valid tokens, >= 0. On a GPU, the count waits for the device
  // where it is not given, which a stream that is being captured forbids. Too small a bound is a
  // c10::ValueError on CPUs; on a GPU, log-probabilities of the tokens too many are NaN.
  std::optional<int64_t> num_valid_tokens{};
};

// What a mean divides by: a number > 0, or a tensor [] of one, which is not read to be checked, so
// that nothing waits for its device.
class Normalizer {
 public:
  // Conversions, for designated initializers: {.pair_normalizer = 8.0}.
  Normalizer(double number) : value_(number) {}
  Normalizer(at::Tensor tensor) : value_(std::move(tensor)) {}

  // One of the two is null.
  const double* number() const { return std::get_if<double>(&value_); }
  const at::Tensor* tensor() const { return std::get_if<at::Tensor>(&value_); }

 private:
  std::variant<double, at::Tensor> value_;
};

// Of a preference loss.
struct SimPOOptions {
  // Scale of the rewards, > 0.
  double beta = 2.0;
  // Target margin over beta, finite. Without it and gamma: 0.5, and 0 for kIpo.
  std::optional<double> gamma_beta_ratio{};
  // Target margin, instead of gamma_beta_ratio.
  std::optional<double> gamma{};
  LossType loss_type = LossType::kSigmoid;
  // Probability in [0, 0.5] that a pair's order is wrong; kSigmoid only.
  double label_smoothing = 0.0;
  // Of AlphaPO: 0, or a magnitude in [1e-30, 1e30].
  double alpha = 0.0;
  // Weight of the SFT term, >= 0.
  double sft_weight = 0.0;
  SftReduction sft_reduction = SftReduction::kSequence;
  // True: a sequence's log-probability is the mean over its valid tokens; false: the sum.
  bool average_log_prob = true;
  Reduction reduction = Reduction::kMean;
  // Replaces the number of counted pairs in a mean, for gradient accumulation and data parallelism:
  // see count_pairs. With kMean only.
  std::optional<Normalizer> pair_normalizer{};
  // Replaces the number of those pairs' chosen tokens, which a token-wise SFT term divides by. With
  // a pair_normalizer only, and not to be left out beside one with SftReduction::kToken.
  std::optional<Normalizer> token_normalizer{};
  Empty empty = Empty::kDrop;
  TokenLogpsOptions tokens{};
};

// Other layouts than rows that are chosen first. cu_seqlens and pairs may lie on the CPU beside
// tokens on a GPU.
struct Layout {
  // [S + 1] of an integer dtype, not decreasing, in [0, N]: sequences packed into one row, of which
  // s is the positions cu_seqlens[s] up to cu_seqlens[s + 1]. Then logits are [N, V], hidden states
  // [N, H] and labels [N], or all of these with a first dimension of 1. No label is taken across
  // the end of a sequence; what lies before the first and after the last is masked. On a GPU, which
  // is not waited for, a sequence whose ends are wrong is masked.
  std::optional<at::Tensor> cu_seqlens{};
  // [P, 2] of an integer dtype: the chosen and the rejected sequence of each pair, as indices of
  // rows or of packed sequences. A sequence may be in several pairs, or in none.
  std::optional<at::Tensor> pairs{};
  // [P] real constants on the tokens' device: a factor on each pair's loss and SFT term, not on
  // what they are divided by. A weight of 0 leaves a pair's loss out, be it NaN.
  std::optional<at::Tensor> pair_weight{};
};

// What SimPOOutput::metrics are, in their order. Of the counted pairs of the batch: means of beta *
// logps, the share with chosen > rejected, strictly, the mean difference (gamma left out), means of
// logps, each NaN where no pair was counted; then numbers, of tokens those of both sides.
inline constexpr std::array<const char*, 9> kMetricNames{
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "num_pairs",        "dropped_pairs",      "num_tokens"};

// float32, or float64 for float64 logits, hidden states or log-probabilities; in nats. All but
// rewards and metrics are differentiable.
struct SimPOOutput {
  at::Tensor loss;              // [], or [P] with Reduction::kNone: what to call backward() on
  at::Tensor losses;            // [P] the loss of each pair, without the SFT term
  at::Tensor chosen_logps;      // [P] mean (or sum) log-probability of each chosen completion
  at::Tensor rejected_logps;    // [P] the same of each rejected completion
  at::Tensor chosen_rewards;    // [P] beta * chosen_logps
  at::Tensor rejected_rewards;  // [P] beta * rejected_logps
  at::Tensor sft_loss;          // the SFT term before its weight; as loss
  at::Tensor metrics;           // [9] float64, on the device of loss: kMetricNames

  // metrics by name, for one copy from the device, which is waited for.
  std::map<std::string, double> read_metrics() const {
    const at::Tensor values = metrics.cpu();
    std::map<std::string, double> by_name;
    for (size_t i = 0; i < kMetricNames.size(); ++i) {
      by_name[kMetricNames[i]] = values.const_data_ptr<double>()[i];
    }
    return by_name;
  }
};

// What the means of a loss divide by; [] float64 on the device of the labels, which is not waited
// for.
struct PairCounts {
  at::Tensor pairs;   // the number of counted pairs
  at::Tensor tokens;  // the number of their chosen completions' valid tokens
};

}  // namespace simpo_ext
