// Computes the loss of a pair from the sums of its sequences, and the loss of the batch from the
// pairs. All devices use this between reading token log-probs and writing gradients. loss_math.h
// has the formulas. Everything is in double, on O(P) values.
#pragma once

#include <cstdint>

#include "core/compensated_sum.h"
#include "core/host_device.h"
#include "core/kernels.h"
#include "core/loss_math.h"

namespace simpo_ext {

// The sum of the log-probs of a sequence's valid tokens, and the number of these tokens.
struct SequenceSum {
  double sum;
  int64_t count;
};

// ---- forward --------------------------------------------------------------------------------

// Stands in for a sequence that does not exist: its pair becomes NaN instead of being dropped.
SIMPO_HOST_DEVICE inline SequenceSum sum_of_nowhere() {
  return {std::numeric_limits<double>::quiet_NaN(), 1};
}

struct ScoredPair {
  SequenceSum chosen, rejected;
  double chosen_logp, rejected_logp;
  double chosen_reward, rejected_reward;
  bool is_counted;
  // The following include the pair's weight. They are 0 if the pair is not counted or its weight is
  // 0, even if they would be NaN.
  double loss;
  double chosen_slope, rejected_slope;  // d loss / d logp
  double sft_loss;                      // -chosen_logp
  double sft_token_loss;                // minus the sum of the chosen tokens' log-probs
};

SIMPO_HOST_DEVICE inline ScoredPair score_pair(SequenceSum chosen, SequenceSum rejected,
                                               double weight, const PreferenceLossArgs& args) {
  const PairLoss& how = args.pair_loss;
  ScoredPair pair{};
  pair.chosen = chosen;
  pair.rejected = rejected;
  pair.chosen_logp = sequence_logp(chosen.sum, chosen.count, args.average);
  pair.rejected_logp = sequence_logp(rejected.sum, rejected.count, args.average);
  const double chosen_shaped = shaped_logp(pair.chosen_logp, how);
  const double rejected_shaped = shaped_logp(pair.rejected_logp, how);
  pair.chosen_reward = how.beta * chosen_shaped;
  pair.rejected_reward = how.beta * rejected_shaped;
  pair.is_counted = is_pair_counted(chosen.count, rejected.count, args.reduction.empty);
  if (pair.is_counted && weight != 0.0) {
    const double margin = scaled_margin(chosen_shaped, rejected_shaped, how);
    pair.loss = weight * pair_loss(margin, how);
    const double slope = weight * pair_loss_slope(margin, how);
    if (slope != 0.0) {  // 0 times an infinite slope of shaped_logp would be NaN
      pair.chosen_slope = slope * shaped_logp_slope(pair.chosen_logp, how);
      pair.rejected_slope = -slope * shaped_logp_slope(pair.rejected_logp, how);
    }
    pair.sft_loss = -weight * pair.chosen_logp;
    pair.sft_token_loss = -weight * chosen.sum;
  }
  return pair;
}

SIMPO_HOST_DEVICE inline double add_sft_term(double loss, double sft_loss,
                                             const LossReduction& reduction) {
  return reduction.sft_weight > 0.0 ? loss + reduction.sft_weight * sft_loss : loss;
}

// Writes the outputs of pair p of P.
template <typename Scalar>
SIMPO_HOST_DEVICE inline void write_pair(const ScoredPair& pair, int64_t p, int64_t P,
                                         const PreferenceLossArgs& args) {
  Scalar* logps = static_cast<Scalar*>(args.logps);
  Scalar* rewards = static_cast<Scalar*>(args.rewards);
  logps[p] = static_cast<Scalar>(pair.chosen_logp);
  logps[P + p] = static_cast<Scalar>(pair.rejected_logp);
  rewards[p] = static_cast<Scalar>(pair.chosen_reward);
  rewards[P + p] = static_cast<Scalar>(pair.rejected_reward);
  static_cast<Scalar*>(args.losses)[p] = static_cast<Scalar>(pair.loss);
  static_cast<Scalar*>(args.slopes)[p] = static_cast<Scalar>(pair.chosen_slope);
  static_cast<Scalar*>(args.slopes)[P + p] = static_cast<Scalar>(pair.rejected_slope);
  if (args.reduction.reduction == Reduction::kNone) {
    static_cast<Scalar*>(args.loss)[p] =
        static_cast<Scalar>(add_sft_term(pair.loss, pair.sft_loss, args.reduction));
    static_cast<Scalar*>(args.sft_loss)[p] = static_cast<Scalar>(pair.sft_loss);
  }
}

// Totals over the counted pairs. Sums are compensated.
struct PreferenceTotals {
  int64_t num_pairs = 0;
  int64_t num_tokens = 0;
  int64_t num_chosen_tokens = 0;
  int64_t num_correct = 0;
  CompensatedSum<double> losses, sft_losses, sft_token_losses;
  CompensatedSum<double> chosen_logps, rejected_logps, chosen_rewards, rejected_rewards, margins;

  SIMPO_HOST_DEVICE void add(const ScoredPair& pair) {
    if (!pair.is_counted) return;
    num_pairs += 1;
    num_tokens += pair.chosen.count + pair.rejected.count;
    num_chosen_tokens += pair.chosen.count;
    num_correct += pair.chosen_reward > pair.rejected_reward ? 1 : 0;
    losses.add(pair.loss);
    sft_losses.add(pair.sft_loss);
    sft_token_losses.add(pair.sft_token_loss);
    chosen_logps.add(pair.chosen_logp);
    rejected_logps.add(pair.rejected_logp);
    chosen_rewards.add(pair.chosen_reward);
    rejected_rewards.add(pair.rejected_reward);
    margins.add(pair.chosen_reward - pair.rejected_reward);
  }

  SIMPO_HOST_DEVICE void merge(const PreferenceTotals& other) {
    num_pairs += other.num_pairs;
    num_tokens += other.num_tokens;
    num_chosen_tokens += other.num_chosen_tokens;
    num_correct += other.num_correct;
    losses.merge(other.losses);
    sft_losses.merge(other.sft_losses);
    sft_token_losses.merge(other.sft_token_losses);
    chosen_logps.merge(other.chosen_logps);
    rejected_logps.merge(other.rejected_logps);
    chosen_rewards.merge(other.chosen_rewards);
    rejected_rewards.merge(other.rejected_rewards);
    margins.merge(other.margins);
  }
};

// Writes the outputs of the whole batch: the reduced losses and the metrics.
template <typename Scalar>
SIMPO_HOST_DEVICE inline void write_totals(const PreferenceTotals& totals, int64_t P,
                                           const PreferenceLossArgs& args) {
  const LossReduction& reduction = args.reduction;
  if (reduction.reduction != Reduction::kNone) {
    const double loss = reduce_total(totals.losses.value(), totals.num_pairs, reduction);
    const double sft_loss =
        reduction.sft_reduction == SftReduction::kSequence
            ? reduce_total(totals.sft_losses.value(), totals.num_pairs, reduction)
            : reduce_total(totals.sft_token_losses.value(), totals.num_chosen_tokens, reduction);
    *static_cast<Scalar*>(args.loss) = static_cast<Scalar>(add_sft_term(loss, sft_loss, reduction));
    *static_cast<Scalar*>(args.sft_loss) = static_cast<Scalar>(sft_loss);
  }
  const double n = static_cast<double>(totals.num_pairs);  // without pairs, the means are 0 / 0
  args.metrics[kRewardsChosen] = totals.chosen_rewards.value() / n;
  args.metrics[kRewardsRejected] = totals.rejected_rewards.value() / n;
  args.metrics[kRewardsAccuracies] = static_cast<double>(totals.num_correct) / n;
  args.metrics[kRewardsMargins] = totals.margins.value() / n;
  args.metrics[kLogpsChosen] = totals.chosen_logps.value() / n;
  args.metrics[kLogpsRejected] = totals.rejected_logps.value() / n;
  args.metrics[kNumPairs] = n;
  args.metrics[kDroppedPairs] = static_cast<double>(P - totals.num_pairs);
  args.metrics[kNumTokens] = static_cast<double>(totals.num_tokens);
}

// ---- backward -------------------------------------------------------------------------------

// The denominators of means over the counted pairs.
struct PairCounts {
  int64_t num_pairs = 0;
  int64_t num_chosen_tokens = 0;

  SIMPO_HOST_DEVICE void add(int64_t chosen_count, int64_t rejected_count, EmptyPolicy empty) {
    if (!is_pair_counted(chosen_count, rejected_count, empty)) return;
    num_pairs += 1;
    num_chosen_tokens += chosen_count;
  }
};

// What a pair adds to the gradient of each valid token log-prob of its sequences.
struct TokenGradients {
  double chosen, rejected;
};

template <typename Scalar>
SIMPO_HOST_DEVICE inline double gradient_at(const void* gradient, int64_t stride, int64_t index) {
  if (gradient == nullptr) return 0.0;
  return static_cast<double>(static_cast<const Scalar*>(gradient)[index * stride]);
}

template <typename Scalar>
SIMPO_HOST_DEVICE inline TokenGradients pair_gradients(int64_t p, int64_t chosen_count,
                                                       int64_t rejected_count, double weight,
                                                       const PairCounts& totals,
                                                       const PreferenceLossBackwardArgs& args) {
  const LossReduction& reduction = args.reduction;
  const int64_t P = args.pairs.P;
  // The gradients of the sequence log-probs, added up in the order of the outputs.
  double grad_chosen = gradient_at<Scalar>(args.grad_logps, args.grad_logps_stride, p);
  double grad_rejected = gradient_at<Scalar>(args.grad_logps, args.grad_logps_stride, P + p);
  double grad_chosen_token = 0.0;
  if (is_pair_counted(chosen_count, rejected_count, reduction.empty)) {
    const double pair_slope = reduce_total_slope<double>(totals.num_pairs, reduction);
    const double grad_loss = gradient_at<Scalar>(args.grad_loss, args.grad_loss_stride, p);
    const double grad_pair_loss =
        grad_loss * pair_slope + gradient_at<Scalar>(args.grad_losses, args.grad_losses_stride, p);
    double grad_sft = gradient_at<Scalar>(args.grad_sft_loss, args.grad_sft_loss_stride, p);
    if (reduction.sft_weight > 0.0) grad_sft += grad_loss * reduction.sft_weight;
    // A gradient of exactly 0 must stay 0 even if the slope is NaN.
    if (grad_pair_loss != 0.0) {
      const Scalar* slopes = static_cast<const Scalar*>(args.slopes);
      grad_chosen += grad_pair_loss * static_cast<double>(slopes[p]);
      grad_rejected += grad_pair_loss * static_cast<double>(slopes[P + p]);
    }
    grad_sft = weight != 0.0 ? grad_sft * weight : 0.0;
    if (grad_sft != 0.0) {
      if (reduction.sft_reduction == SftReduction::kToken) {
        grad_chosen_token =
            -grad_sft * reduce_total_slope<double>(totals.num_chosen_tokens, reduction);
      } else {
        grad_chosen -= grad_sft * pair_slope;
      }
    }
  }
  return {grad_chosen * sequence_logp_slope<double>(chosen_count, args.average) + grad_chosen_token,
          grad_rejected * sequence_logp_slope<double>(rejected_count, args.average)};
}

}  // namespace simpo_ext
