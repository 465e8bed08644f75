// The preference loss and its gradient, from the formulas, and comparisons of the kernels' results
// with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/buffers.h"
#include "kernels/pair_batch.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {

struct DirectPair {
  double chosen_logp, rejected_logp;
  double chosen_shaped, rejected_shaped;  // with alpha
  double chosen_sum, chosen_count, num_tokens;
  bool is_counted;
  double loss = 0, chosen_slope = 0, rejected_slope = 0, sft_loss = 0, sft_token_loss = 0;
};

struct DirectPairs {
  std::vector<DirectPair> pairs;
  double num_pairs = 0, num_tokens = 0, num_chosen_tokens = 0;
};

// The loss of a pair, and its derivative by chosen - rejected.
struct DirectLoss {
  double loss, slope;
};
inline DirectLoss direct_loss(double difference, const PairLoss& how) {
  const double z = difference - how.gamma_beta_ratio, m = how.beta * z;
  if (how.type == LossType::kIpo) {
    const double excess = z - 1.0 / (2.0 * how.beta);
    return {excess * excess, 2.0 * excess};
  }
  if (how.type == LossType::kHinge) {
    if (std::isnan(m)) return {kNan, kNan};
    return {std::max(0.0, 1.0 - m), m < 1.0 ? -how.beta : 0.0};
  }
  const auto logsigmoid = [](double x) {
    return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
  };
  const double eps = how.label_smoothing;
  return {-(1.0 - eps) * logsigmoid(m) - eps * logsigmoid(-m),
          how.beta * (1.0 / (1.0 + std::exp(-m)) - (1.0 - eps))};
}

template <typename Scalar>
DirectPairs score_directly(const PairBatch<Scalar>& batch, const PairList& list,
                           const PairOptions& options) {
  const double alpha = options.pair_loss.alpha;
  const auto logp = [&](const DirectSum& s) {
    if (s.count == 0) return kNan;
    return options.average ? s.sum / static_cast<double>(s.count) : s.sum;
  };
  const auto shaped = [&](double l) {
    return alpha == 0.0 ? l : (1.0 - std::exp(-alpha * l)) / alpha;
  };
  DirectPairs direct;
  for (int64_t p = 0; p < list.P; ++p) {
    const DirectSum chosen = batch.sum_directly(list.chosen(p));
    const DirectSum rejected = batch.sum_directly(list.rejected(p));
    const double l_chosen = logp(chosen), l_rejected = logp(rejected);
    DirectPair pair{
        .chosen_logp = l_chosen,
        .rejected_logp = l_rejected,
        .chosen_shaped = shaped(l_chosen),
        .rejected_shaped = shaped(l_rejected),
        .chosen_sum = chosen.sum,
        .chosen_count = static_cast<double>(chosen.count),
        .num_tokens = static_cast<double>(chosen.count + rejected.count),
        .is_counted = options.reduction.empty == EmptyPolicy::kNan ||
                      (chosen.count > 0 && rejected.count > 0),
    };
    const double weight = list.weight(p);
    if (pair.is_counted && weight != 0.0) {
      const auto [loss, slope] =
          direct_loss(pair.chosen_shaped - pair.rejected_shaped, options.pair_loss);
      pair.loss = weight * loss;
      pair.chosen_slope = weight * slope * (alpha == 0.0 ? 1.0 : std::exp(-alpha * l_chosen));
      pair.rejected_slope = -weight * slope * (alpha == 0.0 ? 1.0 : std::exp(-alpha * l_rejected));
      pair.sft_loss = -weight * l_chosen;
      pair.sft_token_loss = -weight * chosen.sum;
    }
    direct.num_pairs += pair.is_counted;
    direct.num_tokens += pair.is_counted ? pair.num_tokens : 0.0;
    direct.num_chosen_tokens += pair.is_counted ? pair.chosen_count : 0.0;
    direct.pairs.push_back(pair);
  }
  return direct;
}

// The error of rounding an output to Scalar, and in the backward also the slopes. And the error of
// the sums above, which are not compensated and whose differences may be small.
template <typename Scalar>
double direct_error(double magnitude) {
  return 4 * kUnit<Scalar> * magnitude + 1e-13 * (1.0 + magnitude);
}

// The denominator of a sum over pairs or tokens.
inline double denominator(const LossReduction& reduction, double count) {
  return reduction.reduction == Reduction::kMean ? count : 1.0;
}

template <typename Scalar>
void check_forward_directly(const PairOptions& options, const DirectPairs& direct,
                            const PairOutputs<Scalar>& got) {
  const LossReduction& reduction = options.reduction;
  const double beta = options.pair_loss.beta;
  const auto check_sum = [&](double value, double expected, double magnitude, const char* what) {
    require_close(value, expected, direct_error<Scalar>(magnitude), what);
  };
  const auto check = [&](double value, double expected, const char* what) {
    check_sum(value, expected, std::fabs(expected), what);
  };
  const int64_t P = static_cast<int64_t>(direct.pairs.size());
  double loss = 0, sft_loss = 0, magnitude = 0, sft_magnitude = 0, means[6] = {};
  for (int64_t p = 0; p < P; ++p) {
    const DirectPair& pair = direct.pairs[static_cast<size_t>(p)];
    check(got.logps[p], pair.chosen_logp, "logps of chosen");
    check(got.logps[P + p], pair.rejected_logp, "logps of rejected");
    check(got.rewards[p], beta * pair.chosen_shaped, "rewards of chosen");
    check(got.rewards[P + p], beta * pair.rejected_shaped, "rewards of rejected");
    check(got.losses[p], pair.loss, "losses");
    check(got.slopes[p], pair.chosen_slope, "slopes of chosen");
    check(got.slopes[P + p], pair.rejected_slope, "slopes of rejected");
    if (reduction.reduction == Reduction::kNone) {
      check(got.sft_loss[p], pair.sft_loss, "sft_loss");
      const double of_sft = reduction.sft_weight > 0 ? reduction.sft_weight * pair.sft_loss : 0;
      check_sum(got.loss[p], pair.loss + of_sft, std::fabs(pair.loss) + std::fabs(of_sft), "loss");
    }
    if (!pair.is_counted) continue;
    const double of_sft =
        reduction.sft_reduction == SftReduction::kToken ? pair.sft_token_loss : pair.sft_loss;
    loss += pair.loss;
    sft_loss += of_sft;
    magnitude += std::fabs(pair.loss);
    sft_magnitude += std::fabs(of_sft);
    const double terms[] = {beta * pair.chosen_shaped,
                            beta * pair.rejected_shaped,
                            pair.chosen_shaped > pair.rejected_shaped ? 1.0 : 0.0,
                            beta * (pair.chosen_shaped - pair.rejected_shaped),
                            pair.chosen_logp,
                            pair.rejected_logp};
    for (int k = 0; k < 6; ++k) means[k] += terms[k] / direct.num_pairs;
  }
  if (reduction.reduction != Reduction::kNone) {
    const bool is_zero = reduction.reduction == Reduction::kMean && direct.num_pairs == 0 &&
                         reduction.empty == EmptyPolicy::kDrop;
    const double tokens_or_pairs = reduction.sft_reduction == SftReduction::kToken
                                       ? direct.num_chosen_tokens
                                       : direct.num_pairs;
    loss = is_zero ? 0.0 : loss / denominator(reduction, direct.num_pairs);
    sft_loss = is_zero ? 0.0 : sft_loss / denominator(reduction, tokens_or_pairs);
    check_sum(got.sft_loss[0], sft_loss, sft_magnitude, "sft_loss");
    check_sum(got.loss[0], loss + (reduction.sft_weight > 0 ? reduction.sft_weight * sft_loss : 0),
              magnitude + sft_magnitude, "loss");
  }
  const Metric of_means[] = {kRewardsChosen,  kRewardsRejected, kRewardsAccuracies,
                             kRewardsMargins, kLogpsChosen,     kLogpsRejected};
  for (int k = 0; k < 6; ++k) {
    // Chosen and rejected cancel in margins.
    const double size = std::fabs(k == 3 ? means[0] + means[1] : means[k]);
    check_sum(got.metrics[of_means[k]], direct.num_pairs == 0 ? kNan : means[k], size,
              "a mean metric");
  }
  check(got.metrics[kNumPairs], direct.num_pairs, "num_pairs");
  check(got.metrics[kDroppedPairs], static_cast<double>(P) - direct.num_pairs, "dropped_pairs");
  check(got.metrics[kNumTokens], direct.num_tokens, "num_tokens");
}

template <typename Scalar>
void check_backward_directly(const PairBatch<Scalar>& batch, const PairList& list,
                             const PairOptions& options, const DirectPairs& direct,
                             const PairGradients<Scalar>& incoming, const Buffer<Scalar>& got) {
  const LossReduction& reduction = options.reduction;
  const size_t S = static_cast<size_t>(batch.S);
  // The gradient of each token of a sequence.
  std::vector<double> expected(S, 0.0), magnitudes(S, 0.0);
  for (int64_t p = 0; p < list.P; ++p) {
    const DirectPair& pair = direct.pairs[static_cast<size_t>(p)];
    for (const bool is_chosen : {true, false}) {
      const int64_t s = is_chosen ? list.chosen(p) : list.rejected(p);
      const double count = static_cast<double>(batch.sum_directly(s).count);
      const double per_token = options.average ? 1.0 / count : 1.0;
      const auto add = [&](double term) {
        expected[static_cast<size_t>(s)] += term;
        magnitudes[static_cast<size_t>(s)] += std::fabs(term);
      };
      add(incoming.of_logps(is_chosen ? p : list.P + p) * per_token);
      if (!pair.is_counted) continue;
      const double of_pair_loss =
          incoming.of_loss(p) / denominator(reduction, direct.num_pairs) + incoming.of_losses(p);
      const double slope = is_chosen ? pair.chosen_slope : pair.rejected_slope;
      if (of_pair_loss != 0.0) add(of_pair_loss * slope * per_token);
      const double of_sft =
          list.weight(p) * (incoming.of_sft_loss(p) + incoming.of_loss(p) * reduction.sft_weight);
      if (!is_chosen || of_sft == 0.0) continue;
      add(reduction.sft_reduction == SftReduction::kSequence
              ? -of_sft * per_token / denominator(reduction, direct.num_pairs)
              : -of_sft / denominator(reduction, direct.num_chosen_tokens));
    }
  }
  std::vector<bool> is_in_sequence(static_cast<size_t>(got.size()), false);
  for (int64_t s = 0; s < batch.S; ++s) {
    const auto [b, begin, end] = batch.range(s);
    for (int64_t t = begin; t < end; ++t) {
      is_in_sequence[static_cast<size_t>(b * batch.T + t)] = true;
      const double value = static_cast<double>(got[b * batch.T + t]);
      if (batch.targets().is_valid(b, t)) {
        require_close(value, expected[static_cast<size_t>(s)],
                      direct_error<Scalar>(magnitudes[static_cast<size_t>(s)]), "grad_token_logps");
      } else {
        require_equal(value, 0.0, "grad_token_logps of a masked token");
      }
    }
  }
  for (int64_t i = 0; i < got.size(); ++i) {
    require(is_in_sequence[static_cast<size_t>(i)] || got[i] == Scalar(0),
            "grad_token_logps of padding", static_cast<double>(got[i]), 0.0);
  }
}

}  // namespace simpo_ext::kernel_tests
