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

// The loss of a pair, with z = r(chosen) - r(rejected) - gamma / beta; see simpo_loss.
enum class LossType : int64_t {
  kSigmoid = 0,  // -logsigmoid(beta z), with label smoothing if there is any
  kHinge = 1,    // relu(1 - beta z), with subgradient 0 at the kink
  kIpo = 2,      // (z - 1 / (2 beta))^2
};

// How to reduce the losses of the pairs.
enum class Reduction : int64_t {
  kNone = 0,  // loss is [P]
  kMean = 1,  // over the counted pairs; a token-wise SFT term over their chosen tokens
  kSum = 2,
};

// How the SFT term is computed.
enum class SftReduction : int64_t {
  kSequence = 0,  // -chosen_logps, with the same reduction as the losses
  kToken = 1,     // cross entropy over all valid chosen tokens of the batch; not with kNone
};

// How a pair counts if one of its completions has no valid token.
enum class Empty : int64_t {
  // The pair adds nothing to loss, gradient and denominators. The metrics count it as dropped. If
  // all pairs are dropped, the loss is 0.
  kDrop = 0,
  kNan = 1,  // the pair makes the loss NaN
};

// The bounds of logit_scale, softcap and alpha. Within them, float32 keeps the digits of a product
// or quotient with a logit.
inline constexpr double kLeastFactor = 1e-30, kLargestFactor = 1e30;

// How labels score logits.
struct TokenLogpsOptions {
  // The label of masked positions, which are not scored.
  int64_t ignore_index = -100;
  // True: labels[:, t + 1] scores the logits at t, and the last position is masked, as in trainers
  // of causal language models. False: labels[:, t] scores them.
  bool shift = true;
  // Factor on the logits, >= kLeastFactor.
  double logit_scale = 1.0;
  // Bound of the scaled logits, in [kLeastFactor, kLargestFactor]: softcap tanh(z / softcap)
  // replaces z.
  std::optional<double> softcap{};
  // The backward overwrites the logits with their gradient instead of allocating it. The logits
  // must not be a leaf that requires grad, nor a view of one, and their rows must not overlap in
  // memory. Afterwards, a backward through any function that saved the logits throws, including a
  // second one through this function.
  bool inplace_backward = false;
};

// Options of the functions from hidden states, where inplace_backward has no effect.
struct LinearOptions {
  // The bias of lm_head, [V] of hidden's dtype and device.
  std::optional<at::Tensor> bias{};
  // Bytes of logits to hold at a time, >= 0, but at least one chunk of the vocabulary. The backward
  // recomputes the logits that are not kept. Default: default_logits_budget_bytes of hidden's
  // device, which is a sixteenth of a GPU's memory, and 1 GiB on CPUs.
  std::optional<int64_t> logits_budget_bytes{};
  // An upper bound of the number of valid tokens, >= 0. Without it, the host waits for the GPU to
  // count them, which is not possible while a CUDA graph is captured. If the bound is too small,
  // CPUs throw c10::ValueError, and on a GPU the log-probabilities of the tokens beyond it are NaN.
  std::optional<int64_t> num_valid_tokens{};
};

// The denominator of a mean: a number > 0, or a tensor [] with one. The value of a tensor is not
// checked, because the host would have to wait for its device.
class Normalizer {
 public:
  // Implicit, for designated initializers: {.pair_normalizer = 8.0}.
  Normalizer(double number) : value_(number) {}
  Normalizer(at::Tensor tensor) : value_(std::move(tensor)) {}

  // One of the two is null.
  const double* number() const { return std::get_if<double>(&value_); }
  const at::Tensor* tensor() const { return std::get_if<at::Tensor>(&value_); }

 private:
  std::variant<double, at::Tensor> value_;
};

// The options of a preference loss.
struct SimPOOptions {
  // Scale of the rewards, > 0.
  double beta = 2.0;
  // Target margin over beta, finite. Default, without gamma: 0.5, and 0 for kIpo.
  std::optional<double> gamma_beta_ratio{};
  // Target margin, instead of gamma_beta_ratio.
  std::optional<double> gamma{};
  LossType loss_type = LossType::kSigmoid;
  // Probability in [0, 0.5] that a pair's order is wrong; kSigmoid only.
  double label_smoothing = 0.0;
  // AlphaPO's alpha: 0, or a magnitude in [kLeastFactor, kLargestFactor].
  double alpha = 0.0;
  // Weight of the SFT term, >= 0.
  double sft_weight = 0.0;
  SftReduction sft_reduction = SftReduction::kSequence;
  // True: a sequence's log-probability is the mean over its valid tokens; false: the sum.
  bool average_log_prob = true;
  Reduction reduction = Reduction::kMean;
  // Replaces the number of counted pairs as the denominator of the mean, for gradient accumulation
  // and data parallelism: see count_pairs. With kMean only.
  std::optional<Normalizer> pair_normalizer{};
  // Replaces the number of these pairs' chosen tokens, the denominator of a token-wise SFT term.
  // With a pair_normalizer only. SftReduction::kToken needs both or neither.
  std::optional<Normalizer> token_normalizer{};
  Empty empty = Empty::kDrop;
  TokenLogpsOptions tokens{};
};

// Layouts other than P chosen rows followed by P rejected rows. cu_seqlens and pairs may be on the
// CPU while the tokens are on a GPU.
struct Layout {
  // [S + 1] of an integer dtype, not decreasing, in [0, N], for sequences packed into one row:
  // sequence s has the positions from cu_seqlens[s] up to cu_seqlens[s + 1]. Then logits are
  // [N, V], hidden states [N, H] and labels [N], or all of these with a first dimension of 1. The
  // label shift does not cross the end of a sequence. Positions before the first sequence and after
  // the last are masked. On a GPU, a sequence with wrong ends is masked, since the host does not
  // wait to check them.
  std::optional<at::Tensor> cu_seqlens{};
  // [P, 2] of an integer dtype: indices of the chosen and the rejected sequence of each pair, which
  // are rows or packed sequences. A sequence may be in several pairs, or in none.
  std::optional<at::Tensor> pairs{};
  // [P] real constants on the tokens' device: a factor on each pair's loss and SFT term, but not on
  // the denominators. With a weight of 0, a pair's loss is 0 even if it would be NaN.
  std::optional<at::Tensor> pair_weight{};
};

// The names of SimPOOutput::metrics, in order. Over the counted pairs of the batch: the means of
// beta * logps, the share of pairs with chosen > rejected, the mean difference of the rewards
// without gamma, and the means of logps. All of these are NaN if no pair was counted. Then the
// numbers of counted pairs, of dropped pairs, and of scored tokens on both sides.
inline constexpr std::array<const char*, 9> kMetricNames{
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "num_pairs",        "dropped_pairs",      "num_tokens"};

// The results of a loss: float32, or float64 if logits, hidden states or log-probabilities are
// float64; in nats. All but rewards and metrics are differentiable.
struct SimPOOutput {
  at::Tensor loss;              // [], or [P] with Reduction::kNone: call backward() on this
  at::Tensor losses;            // [P] the loss of each pair, without the SFT term
  at::Tensor chosen_logps;      // [P] mean (or sum) log-probability of each chosen completion
  at::Tensor rejected_logps;    // [P] the same of each rejected completion
  at::Tensor chosen_rewards;    // [P] beta * chosen_logps
  at::Tensor rejected_rewards;  // [P] beta * rejected_logps
  at::Tensor sft_loss;          // the SFT term before its weight; the same shape as loss
  at::Tensor metrics;           // [9] float64, on the device of loss: kMetricNames

  // The metrics by name. Copies them from the device and waits for it.
  std::map<std::string, double> read_metrics() const {
    const at::Tensor values = metrics.cpu();
    std::map<std::string, double> by_name;
    for (size_t i = 0; i < kMetricNames.size(); ++i) {
      by_name[kMetricNames[i]] = values.const_data_ptr<double>()[i];
    }
    return by_name;
  }
};

// The denominators of a mean loss, [] float64 on the device of the labels. The host does not wait
// for the device.
struct PairCounts {
  at::Tensor pairs;   // the number of counted pairs
  at::Tensor tokens;  // the number of valid tokens in their chosen completions
};

}  // namespace simpo_ext
