// The preference loss on the CPU.
//
// Memory contract: the forward reads each valid token log-prob once and writes O(P); the backward
// reads labels and O(P), and writes [2P, T]. Scratch: 8 bytes a sequence. Sums over tokens and over
// pairs are compensated, in double, in a fixed order.

#include <vector>

#include "core/compensated_sum.h"
#include "core/kernels.h"
#include "cpu/dtype_dispatch.h"
#include "cpu/sequence_logps.h"

namespace simpo_ext::cpu {
namespace {

// Running totals over the counted pairs.
struct Totals {
  int64_t num_pairs = 0;
  int64_t num_tokens = 0;
  int64_t num_chosen_tokens = 0;
  int64_t num_correct = 0;
  CompensatedSum<double> losses, chosen_logps, rejected_logps, chosen_rewards, rejected_rewards,
      margins, chosen_token_logps;
};

template <typename Scalar>
void forward(const PreferenceLossArgs& args, ParallelFor parallel_for) {
  const int64_t P = args.targets.B / 2;
  const LossReduction& reduction = args.reduction;
  const Scalar* token_logps = static_cast<const Scalar*>(args.token_logps);
  Scalar* loss = static_cast<Scalar*>(args.loss);
  Scalar* losses = static_cast<Scalar*>(args.losses);
  Scalar* logps = static_cast<Scalar*>(args.logps);
  Scalar* rewards = static_cast<Scalar*>(args.rewards);
  Scalar* sft_loss = static_cast<Scalar*>(args.sft_loss);
  Scalar* slopes = static_cast<Scalar*>(args.slopes);

  std::vector<double> sums(static_cast<size_t>(2 * P));
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const SequenceSum total = sum_valid_tokens(token_logps, args.token_strides, args.targets, b);
      sums[static_cast<size_t>(b)] = total.sum;
      args.counts[b] = total.count;
    }
  };
  parallel_for(0, 2 * P, sequences_per_task(args.targets.T), do_sequences);

  Totals totals;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t chosen_count = args.counts[p], rejected_count = args.counts[P + p];
    const double chosen_sum = sums[static_cast<size_t>(p)];
    const double chosen = sequence_logp(chosen_sum, chosen_count, args.average);
    const double rejected =
        sequence_logp(sums[static_cast<size_t>(P + p)], rejected_count, args.average);
    const double chosen_reward = args.pair_loss.beta * chosen;
    const double rejected_reward = args.pair_loss.beta * rejected;
    logps[p] = static_cast<Scalar>(chosen);
    logps[P + p] = static_cast<Scalar>(rejected);
    rewards[p] = static_cast<Scalar>(chosen_reward);
    rewards[P + p] = static_cast<Scalar>(rejected_reward);

    double pair_value = 0.0, slope = 0.0, sft_value = 0.0;
    if (is_pair_counted(chosen_count, rejected_count, reduction.empty)) {
      const double margin = scaled_margin(chosen, rejected, args.pair_loss);
      pair_value = pair_loss(margin, args.pair_loss);
      slope = pair_loss_slope(margin, args.pair_loss);
      sft_value = -chosen;
      totals.num_pairs += 1;
      totals.num_tokens += chosen_count + rejected_count;
      totals.num_chosen_tokens += chosen_count;
      totals.num_correct += chosen_reward > rejected_reward ? 1 : 0;
      totals.losses.add(pair_value);
      totals.chosen_logps.add(chosen);
      totals.rejected_logps.add(rejected);
      totals.chosen_rewards.add(chosen_reward);
      totals.rejected_rewards.add(rejected_reward);
      totals.margins.add(chosen_reward - rejected_reward);
      totals.chosen_token_logps.add(chosen_sum);
    }
    losses[p] = static_cast<Scalar>(pair_value);
    slopes[p] = static_cast<Scalar>(slope);
    if (reduction.reduction == Reduction::kNone) {
      const double total =
          reduction.sft_weight > 0.0 ? pair_value + reduction.sft_weight * sft_value : pair_value;
      loss[p] = static_cast<Scalar>(total);
      sft_loss[p] = static_cast<Scalar>(sft_value);
    }
  }

  if (reduction.reduction != Reduction::kNone) {
    const int64_t pairs = totals.num_pairs;
    const double sft =
        reduction.sft_reduction == SftReduction::kSequence
            ? reduce_total(-totals.chosen_logps.value(), pairs, reduction)
            : reduce_total(-totals.chosen_token_logps.value(), totals.num_chosen_tokens, reduction);
    const double preference = reduce_total(totals.losses.value(), pairs, reduction);
    const double total =
        reduction.sft_weight > 0.0 ? preference + reduction.sft_weight * sft : preference;
    *loss = static_cast<Scalar>(total);
    *sft_loss = static_cast<Scalar>(sft);
  }

  const double n = static_cast<double>(totals.num_pairs);  // no pair: 0 / 0, the metrics' NaN
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

template <typename Scalar>
double gradient_at(const void* gradient, int64_t stride, int64_t index) {
  if (gradient == nullptr) return 0.0;
  return static_cast<double>(static_cast<const Scalar*>(gradient)[index * stride]);
}

template <typename Scalar>
void backward(const PreferenceLossBackwardArgs& args, ParallelFor parallel_for) {
  const int64_t P = args.targets.B / 2;
  const LossReduction& reduction = args.reduction;
  const Scalar* slopes = static_cast<const Scalar*>(args.slopes);
  Scalar* grad_token_logps = static_cast<Scalar*>(args.grad_token_logps);

  int64_t num_pairs = 0, num_chosen_tokens = 0;
  for (int64_t p = 0; p < P; ++p) {
    if (is_pair_counted(args.counts[p], args.counts[P + p], reduction.empty)) {
      num_pairs += 1;
      num_chosen_tokens += args.counts[p];
    }
  }
  const double pair_slope = reduce_total_slope<double>(num_pairs, reduction);
  const bool sft_by_token = reduction.sft_reduction == SftReduction::kToken;
  const double sft_slope =
      sft_by_token ? reduce_total_slope<double>(num_chosen_tokens, reduction) : pair_slope;

  const auto do_pairs = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      // Of the sequence log-probs, in the order the outputs feed them.
      double grad_chosen = gradient_at<Scalar>(args.grad_logps, args.grad_logps_stride, p);
      double grad_rejected = gradient_at<Scalar>(args.grad_logps, args.grad_logps_stride, P + p);
      double grad_chosen_token = 0.0;
      if (is_pair_counted(args.counts[p], args.counts[P + p], reduction.empty)) {
        const double grad_loss = gradient_at<Scalar>(args.grad_loss, args.grad_loss_stride, p);
        const double grad_pair_loss =
            grad_loss * pair_slope +
            gradient_at<Scalar>(args.grad_losses, args.grad_losses_stride, p);
        double grad_sft = gradient_at<Scalar>(args.grad_sft_loss, args.grad_sft_loss_stride, p);
        if (reduction.sft_weight > 0.0) grad_sft += grad_loss * reduction.sft_weight;
        // A gradient of exactly 0 is selected, so that a NaN slope nobody asked for does not count.
        if (grad_pair_loss != 0.0) {
          const double slope = static_cast<double>(slopes[p]);
          grad_chosen += grad_pair_loss * slope;
          grad_rejected -= grad_pair_loss * slope;
        }
        if (grad_sft != 0.0)
          (sft_by_token ? grad_chosen_token : grad_chosen) -= grad_sft * sft_slope;
      }
      const double chosen_slope = sequence_logp_slope<double>(args.counts[p], args.average);
      const double rejected_slope = sequence_logp_slope<double>(args.counts[P + p], args.average);
      spread_to_valid_tokens(grad_chosen * chosen_slope + grad_chosen_token, args.targets, p,
                             grad_token_logps);
      spread_to_valid_tokens(grad_rejected * rejected_slope, args.targets, P + p, grad_token_logps);
    }
  };
  parallel_for(0, P, sequences_per_task(2 * args.targets.T), do_pairs);
}

}  // namespace

void preference_loss(const PreferenceLossArgs& args, ParallelFor parallel_for) {
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, parallel_for); });
}

void preference_loss_backward(const PreferenceLossBackwardArgs& args, ParallelFor parallel_for) {
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args, parallel_for); });
}

}  // namespace simpo_ext::cpu
