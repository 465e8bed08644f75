// The options and results of simpo_ext.h's functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace simpo_ext {

enum class LossType : int64_t { kSigmoid = 0, kHinge = 1, kIpo = 2 };
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
  std::optional<double> gamma_beta_ratio{};  // without it and gamma 0.5, and 0 for IPO
  std::optional<double> gamma{};
  LossType loss_type = LossType::kSigmoid;
  double label_smoothing = 0.0;
  double alpha = 0.0;  // of AlphaPO
  double sft_weight = 0.0;
  SftReduction sft_reduction = SftReduction::kSequence;
  bool average_log_prob = true;
  Reduction reduction = Reduction::kMean;
  std::optional<double> pair_normalizer{};   // replaces the number of counted pairs in a mean
  std::optional<double> token_normalizer{};  // and that of their chosen tokens
  Empty empty = Empty::kDrop;
  TokenLogpsOptions tokens{};
};

// Other layouts than rows that are chosen first. cu_seqlens and pairs may lie on the CPU beside
// tokens on a GPU.
struct Layout {
  // [S + 1]: sequences packed into one row. Then logits are [N, V], hidden states [N, H] and labels
  // [N], or all of these with a first dimension of 1.
  std::optional<at::Tensor> cu_seqlens{};
  std::optional<at::Tensor> pairs{};        // [P, 2]: the chosen and the rejected sequence of each
  std::optional<at::Tensor> pair_weight{};  // [P]: a factor on each pair's loss, a constant
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

}  // namespace simpo_ext
