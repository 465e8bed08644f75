// sequence_logps, preference_loss and their gradients: against the CPU kernels, which add up in
// another order, and for small batches against the formulas written out.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/pair_batch.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {
namespace {

constexpr ParallelFor kOneThread{[](int64_t begin, int64_t end, int64_t, ParallelFor::Body body,
                                    void* context) { body(begin, end, context); },
                                 [] { return int64_t{1}; }};

// float: one unit in the last place. double: 1e-15. Sums are compensated, so whatever their order,
// they agree before the last rounding; what follows is the same code.
bool agree(float got, float expected) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::nextafter(got, expected) == expected;
}
bool agree(double got, double expected) {
  return is_close(got, expected, 1e-15 * std::fabs(expected));
}
bool agree(int64_t got, int64_t expected) { return got == expected; }

template <typename T>
void require_agreement(const Buffer<T>& got, const Buffer<T>& expected, const char* what) {
  for (int64_t i = 0; i < expected.size(); ++i) {
    require(agree(got[i], expected[i]), what, static_cast<double>(got[i]),
            static_cast<double>(expected[i]));
  }
}

// ---- the formulas, written out ----------------------------------------------------------------

struct DirectPairs {
  std::vector<double> sums, counts, logps, losses, slopes;
  std::vector<bool> is_counted;
  double num_pairs = 0, num_tokens = 0, num_chosen_tokens = 0;
};

template <typename Scalar>
DirectPairs score_directly(const PairBatch<Scalar>& batch, const PairOptions& options) {
  const size_t P = static_cast<size_t>(batch.B / 2);
  DirectPairs direct;
  for (int64_t b = 0; b < batch.B; ++b) {
    double sum = 0.0, count = 0.0;
    for (int64_t t = 0; t < batch.T; ++t) {
      if (!batch.targets().is_valid(b, t)) continue;
      sum += batch.token_logp(b, t);
      count += 1.0;
    }
    direct.sums.push_back(sum);
    direct.counts.push_back(count);
    direct.logps.push_back(count == 0.0 ? kNan : options.average ? sum / count : sum);
  }
  const auto logsigmoid = [](double x) {
    return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
  };
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  for (size_t p = 0; p < P; ++p) {
    const PairLoss& how = options.pair_loss;
    const double margin = how.beta * (direct.logps[p] - direct.logps[P + p] - how.gamma_beta_ratio);
    const double eps = how.label_smoothing;
    const bool is_counted = options.reduction.empty == EmptyPolicy::kNan ||
                            (direct.counts[p] > 0.0 && direct.counts[P + p] > 0.0);
    double loss = -(1.0 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin);
    double slope = how.beta * (sigmoid(margin) - (1.0 - eps));
    if (how.type == LossType::kHinge) {
      loss = std::isnan(margin) ? kNan : std::max(0.0, 1.0 - margin);
      slope = std::isnan(margin) ? kNan : margin < 1.0 ? -how.beta : 0.0;
    }
    direct.is_counted.push_back(is_counted);
    direct.losses.push_back(is_counted ? loss : 0.0);
    direct.slopes.push_back(is_counted ? slope : 0.0);
    direct.num_pairs += is_counted;
    direct.num_tokens += is_counted ? direct.counts[p] + direct.counts[P + p] : 0.0;
    direct.num_chosen_tokens += is_counted ? direct.counts[p] : 0.0;
  }
  return direct;
}

// Rounding an output to Scalar, in the backward also the slopes it starts from; and the sums above,
// which are not compensated, through differences that are small against them.
template <typename Scalar>
double direct_error(double magnitude) {
  return 4 * kUnit<Scalar> * magnitude + 1e-13 * (1.0 + magnitude);
}

// What a sum over pairs or tokens is divided by.
double denominator(const LossReduction& reduction, double count) {
  return reduction.reduction == Reduction::kMean ? count : 1.0;
}

template <typename Scalar>
void check_forward_directly(const PairBatch<Scalar>& batch, const PairOptions& options,
                            const DirectPairs& direct, const PairOutputs<Scalar>& got) {
  const LossReduction& reduction = options.reduction;
  const auto check = [&](double value, double expected, const char* what) {
    require_close(value, expected, direct_error<Scalar>(std::fabs(expected)), what);
  };
  const int64_t P = batch.B / 2;
  double loss = 0, sft_loss = 0, means[6] = {};
  for (int64_t p = 0; p < P; ++p) {
    const size_t i = static_cast<size_t>(p), j = static_cast<size_t>(P + p);
    const double chosen = direct.logps[i], rejected = direct.logps[j];
    const double beta = options.pair_loss.beta;
    check(got.logps[p], chosen, "logps of chosen");
    check(got.logps[P + p], rejected, "logps of rejected");
    check(got.rewards[p], beta * chosen, "rewards of chosen");
    check(got.rewards[P + p], beta * rejected, "rewards of rejected");
    check(got.losses[p], direct.losses[i], "losses");
    check(got.slopes[p], direct.slopes[i], "slopes");
    const double pair_sft_loss = direct.is_counted[i] ? -chosen : 0.0;
    if (reduction.reduction == Reduction::kNone) {
      check(got.sft_loss[p], pair_sft_loss, "sft_loss");
      check(
          got.loss[p],
          direct.losses[i] + (reduction.sft_weight > 0 ? reduction.sft_weight * pair_sft_loss : 0),
          "loss");
    }
    if (!direct.is_counted[i]) continue;
    loss += direct.losses[i];
    sft_loss -= reduction.sft_reduction == SftReduction::kToken ? direct.sums[i] : chosen;
    const double terms[] = {
        beta * chosen, beta * rejected, chosen > rejected ? 1.0 : 0.0, beta * (chosen - rejected),
        chosen,        rejected};
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
    check(got.sft_loss[0], sft_loss, "sft_loss");
    check(got.loss[0], loss + (reduction.sft_weight > 0 ? reduction.sft_weight * sft_loss : 0),
          "loss");
  }
  const Metric of_means[] = {kRewardsChosen,  kRewardsRejected, kRewardsAccuracies,
                             kRewardsMargins, kLogpsChosen,     kLogpsRejected};
  for (int k = 0; k < 6; ++k) {
    check(got.metrics[of_means[k]], direct.num_pairs == 0 ? kNan : means[k], "a mean metric");
  }
  check(got.metrics[kNumPairs], direct.num_pairs, "num_pairs");
  check(got.metrics[kDroppedPairs], static_cast<double>(P) - direct.num_pairs, "dropped_pairs");
  check(got.metrics[kNumTokens], direct.num_tokens, "num_tokens");
}

template <typename Scalar>
void check_backward_directly(const PairBatch<Scalar>& batch, const PairOptions& options,
                             const DirectPairs& direct, const PairGradients<Scalar>& incoming,
                             const Buffer<Scalar>& got) {
  const LossReduction& reduction = options.reduction;
  const int64_t P = batch.B / 2;
  for (int64_t b = 0; b < batch.B; ++b) {
    const int64_t p = b % P;
    const bool is_chosen = b < P;
    const size_t i = static_cast<size_t>(p);
    const double count = direct.counts[static_cast<size_t>(b)];
    const double per_token = options.average ? 1.0 / count : 1.0;
    double expected = incoming.of_logps(b) * per_token;
    double magnitude = std::fabs(expected);
    if (direct.is_counted[i]) {
      const double of_pair_loss =
          incoming.of_loss(p) / denominator(reduction, direct.num_pairs) + incoming.of_losses(p);
      const double from_loss = of_pair_loss == 0.0 ? 0.0
                                                   : of_pair_loss * direct.slopes[i] *
                                                         (is_chosen ? 1.0 : -1.0) * per_token;
      const double of_sft = incoming.of_sft_loss(p) + incoming.of_loss(p) * reduction.sft_weight;
      const bool per_sequence = reduction.sft_reduction == SftReduction::kSequence;
      const double from_sft = !is_chosen || of_sft == 0.0 ? 0.0
                              : per_sequence
                                  ? -of_sft * per_token / denominator(reduction, direct.num_pairs)
                                  : -of_sft / denominator(reduction, direct.num_chosen_tokens);
      expected += from_loss + from_sft;
      magnitude += std::fabs(from_loss) + std::fabs(from_sft);
    }
    for (int64_t t = 0; t < batch.T; ++t) {
      const double value = static_cast<double>(got[b * batch.T + t]);
      if (batch.targets().is_valid(b, t)) {
        require_close(value, expected, direct_error<Scalar>(magnitude), "grad_token_logps");
      } else {
        require_equal(value, 0.0, "grad_token_logps of a masked token");
      }
    }
  }
}

// ---- cases ------------------------------------------------------------------------------------

template <typename Scalar>
void check_pairs(int64_t P, int64_t num_positions, const PairOptions& options, uint64_t seed,
                 Contents contents = Contents::kOrdinary) {
  const bool shift = seed % 2 == 1;
  const unsigned missing = P > 5 ? 0 : static_cast<unsigned>(seed / 2 % 16);
  describe(
      "%s, P %ld, T %ld, average %d, loss type %ld, beta %g, label smoothing %g, reduction %ld, "
      "sft "
      "reduction %ld, sft weight %g, empty policy %ld, seed %lu, contents %d, missing gradients "
      "0x%x",
      DTypeOf<Scalar>::name, P, num_positions, options.average,
      static_cast<int64_t>(options.pair_loss.type), options.pair_loss.beta,
      options.pair_loss.label_smoothing, static_cast<int64_t>(options.reduction.reduction),
      static_cast<int64_t>(options.reduction.sft_reduction), options.reduction.sft_weight,
      static_cast<int64_t>(options.reduction.empty), seed, static_cast<int>(contents), missing);
  const PairBatch<Scalar> batch(2 * P, num_positions, shift, seed / 3, contents);
  const PairOutputs<Scalar> got(P, options), expected(P, options);
  require_equal(cuda::preference_loss(got.args(batch, options), nullptr), 0,
                "error of the forward");
  cpu::preference_loss(expected.args(batch, options), kOneThread);
  require_agreement(got.loss, expected.loss, "loss as on the CPU");
  require_agreement(got.losses, expected.losses, "losses as on the CPU");
  require_agreement(got.logps, expected.logps, "logps as on the CPU");
  require_agreement(got.rewards, expected.rewards, "rewards as on the CPU");
  require_agreement(got.sft_loss, expected.sft_loss, "sft_loss as on the CPU");
  require_agreement(got.metrics, expected.metrics, "metrics as on the CPU");
  require_agreement(got.slopes, expected.slopes, "slopes as on the CPU");
  require_agreement(got.counts, expected.counts, "counts as on the CPU");

  const PairGradients<Scalar> incoming(P, options, missing, seed);
  const Buffer<Scalar> grad(2 * P * num_positions), expected_grad(2 * P * num_positions);
  require_equal(
      cuda::preference_loss_backward(incoming.args(batch, options, expected, grad.data()), nullptr),
      0, "error of the backward");
  cpu::preference_loss_backward(incoming.args(batch, options, expected, expected_grad.data()),
                                kOneThread);
  require_agreement(grad, expected_grad, "grad_token_logps as on the CPU");

  if (contents == Contents::kInfinities || P > 5 || num_positions > 40) return;
  const DirectPairs direct = score_directly(batch, options);
  check_forward_directly(batch, options, direct, got);
  check_backward_directly(batch, options, direct, incoming, grad);
}

template <typename Scalar>
void check_sequences(int64_t B, int64_t num_positions, bool average, uint64_t seed) {
  describe("sequence_logps of %s, B %ld, T %ld, average %d, seed %lu", DTypeOf<Scalar>::name, B,
           num_positions, average, seed);
  const PairBatch<Scalar> batch(B, num_positions, seed % 2 == 1, seed / 2);
  const Buffer<Scalar> logps(B), expected_logps(B);
  const Buffer<int64_t> counts(B), expected_counts(B);
  SequenceLogpsArgs args{batch.kDType, batch.token_logps(), batch.token_strides, batch.targets(),
                         average,      logps.data(),        counts.data()};
  require_equal(cuda::sequence_logps(args, nullptr), 0, "error of the forward");
  args.logps = expected_logps.data();
  args.counts = expected_counts.data();
  cpu::sequence_logps(args, kOneThread);
  require_agreement(logps, expected_logps, "logps as on the CPU");
  require_agreement(counts, expected_counts, "counts as on the CPU");
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0.0, count = 0.0;
    for (int64_t t = 0; t < num_positions; ++t) {
      if (!batch.targets().is_valid(b, t)) continue;
      sum += batch.token_logp(b, t);
      count += 1.0;
    }
    require_equal(static_cast<double>(counts[b]), count, "counts");
    const double logp = count == 0.0 ? kNan : average ? sum / count : sum;
    // The sum above is not compensated.
    require_close(static_cast<double>(logps[b]), logp,
                  (2 * kUnit<Scalar> + 300 * kUnit<double>)*std::fabs(logp), "logps");
  }

  constexpr int64_t kStride = 3;
  const Buffer<Scalar> incoming(B * kStride), grad(B * num_positions), expected_grad(grad.size());
  for (int64_t b = 0; b < B; ++b) incoming[b * kStride] = static_cast<Scalar>(0.3 * b - 1.0);
  SequenceLogpsBackwardArgs backward{batch.kDType, batch.targets(), average,    incoming.data(),
                                     kStride,      counts.data(),   grad.data()};
  require_equal(cuda::sequence_logps_backward(backward, nullptr), 0, "error of the backward");
  backward.grad_token_logps = expected_grad.data();
  cpu::sequence_logps_backward(backward, kOneThread);
  require_agreement(grad, expected_grad, "grad_token_logps as on the CPU");
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < num_positions; ++t) {
      const double g = static_cast<double>(incoming[b * kStride]);
      const double expected = !batch.targets().is_valid(b, t) ? 0.0
                              : average                       ? g / static_cast<double>(counts[b])
                                                              : g;
      require_close(static_cast<double>(grad[b * num_positions + t]), expected,
                    2 * kUnit<Scalar> * std::fabs(expected), "grad_token_logps");
    }
  }
}

std::vector<PairOptions> all_options() {
  std::vector<PairOptions> options;
  const PairLoss losses[] = {{LossType::kSigmoid, 2.0, 0.5, 0.0},
                             {LossType::kSigmoid, 2.5, 0.3, 0.1},
                             {LossType::kHinge, 1.5, 0.2, 0.0}};
  for (const PairLoss& loss : losses) {
    for (const Reduction reduction : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
      for (const SftReduction sft : {SftReduction::kSequence, SftReduction::kToken}) {
        // A sum over tokens for each pair is no reduction that the ops let through.
        if (reduction == Reduction::kNone && sft == SftReduction::kToken) continue;
        for (const double sft_weight : {0.0, 0.5}) {
          for (const EmptyPolicy empty : {EmptyPolicy::kDrop, EmptyPolicy::kNan}) {
            for (const bool average : {true, false}) {
              options.push_back({average, loss, {reduction, sft, empty, sft_weight}});
            }
          }
        }
      }
    }
  }
  return options;
}

template <typename Scalar>
void check_scalar(bool reduced) {
  const std::vector<PairOptions> options = all_options();
  uint64_t seed = 0;
  // All options, and all gradients missing or not, where it costs little.
  for (size_t i = 0; i < options.size(); i += reduced ? 97 : 1) {
    for (int repeat = 0; repeat < (reduced ? 1 : 3); ++repeat)
      check_pairs<Scalar>(5, 5, options[i], seed++);
    check_pairs<Scalar>(3, 40, options[i], seed++);
    check_pairs<Scalar>(1, 5, options[i], seed++, Contents::kAllEmpty);
    check_pairs<Scalar>(5, 5, options[i], seed++, Contents::kInfinities);
  }

  // P: none, one, a few, more pairs than threads of a block, several rounds of them.
  // T: none, one, fewer than threads of a warp, of a block, several rounds of a block.
  const PairOptions means{true,
                          {LossType::kSigmoid, 2.0, 0.5, 0.0},
                          {Reduction::kMean, SftReduction::kToken, EmptyPolicy::kDrop, 0.5}};
  size_t next = 0;
  for (const int64_t P : {0, 1, 3, 5, 130, 1100}) {
    for (const int64_t num_positions : {0, 1, 2, 5, 40, 300}) {
      if (P == 1100 && num_positions > 2) continue;
      if (reduced && P * (num_positions + 1) > 300) continue;
      const int repeats = reduced ? 1 : P > 5 ? 3 : 8;
      for (int i = 0; i < repeats; ++i) {
        // First one whose gradient depends on how many pairs and tokens there are.
        check_pairs<Scalar>(P, num_positions, i == 0 ? means : options[next % options.size()],
                            seed++);
        next += 7;
      }
      check_sequences<Scalar>(2 * P, num_positions, seed % 2 == 0, seed / 2);
      check_sequences<Scalar>(2 * P, num_positions, seed % 2 == 1, seed / 2 + 1);
      ++seed;
    }
  }
}

}  // namespace

void check_preference(bool reduced) {
  check_scalar<double>(reduced);
  check_scalar<float>(reduced);
}

}  // namespace simpo_ext::kernel_tests
