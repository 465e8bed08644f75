// preference_loss and its gradient, compared with the CPU kernels, which add up in another order,
// and for small batches with the formulas.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/kernels.h"
#include "kernels/agreement.h"
#include "kernels/buffers.h"
#include "kernels/pair_batch.h"
#include "kernels/pair_formulas.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {
namespace {

struct Arrangement {
  bool is_flat = false;
  bool has_indices = false;
  bool has_weights = false;
  int64_t S = 0;  // the number of sequences with indices; without, it is 2P
};

// All arrangements, one after another.
Arrangement arrangement_of(uint64_t i, int64_t P) {
  // More sequences than pairs need, or fewer.
  const int64_t S = i / 8 % 2 == 0 ? P + P / 2 + 1 : P / 2 + 1;
  return {(i & 1) != 0, (i & 2) != 0, (i & 4) != 0, S};
}

template <typename Scalar>
void check_pairs(int64_t P, int64_t num_positions, const PairOptions& options, uint64_t seed,
                 Arrangement how, Contents contents = Contents::kOrdinary) {
  const bool shift = seed % 2 == 1;
  const unsigned missing = P > 5 ? 0 : static_cast<unsigned>(seed / 2 % 16);
  const int64_t S = how.has_indices ? how.S : 2 * P;
  describe(
      "%s, P %ld, S %ld, T %ld, flat %d, indices %d, weights %d, average %d, loss type %ld, beta "
      "%g, alpha %g, label smoothing %g, reduction %ld, sft reduction %ld, sft weight %g, empty "
      "policy %ld, seed %lu, contents %d, missing gradients 0x%x",
      DTypeOf<Scalar>::name, P, S, num_positions, how.is_flat, how.has_indices, how.has_weights,
      options.average, static_cast<int64_t>(options.pair_loss.type), options.pair_loss.beta,
      options.pair_loss.alpha, options.pair_loss.label_smoothing,
      static_cast<int64_t>(options.reduction.reduction),
      static_cast<int64_t>(options.reduction.sft_reduction), options.reduction.sft_weight,
      static_cast<int64_t>(options.reduction.empty), seed, static_cast<int>(contents), missing);
  const PairBatch<Scalar> batch({S, num_positions, how.is_flat}, shift, seed / 3, contents);
  const PairList list(P, S, how.has_indices, how.has_weights, seed);
  const PairOutputs<Scalar> got(S, P, options), expected(S, P, options);
  require_equal(cuda::preference_loss(got.args(batch, list, options), nullptr), 0,
                "error of the forward");
  require(!cpu::preference_loss(expected.args(batch, list, options), kOneThread).found(),
          "no error of the forward on the CPU");
  require_agreement(got.loss, expected.loss, "loss as on the CPU");
  require_agreement(got.losses, expected.losses, "losses as on the CPU");
  require_agreement(got.logps, expected.logps, "logps as on the CPU");
  require_agreement(got.rewards, expected.rewards, "rewards as on the CPU");
  require_agreement(got.sft_loss, expected.sft_loss, "sft_loss as on the CPU");
  require_agreement(got.metrics, expected.metrics, "metrics as on the CPU");
  require_agreement(got.slopes, expected.slopes, "slopes as on the CPU");
  require_agreement(got.counts, expected.counts, "counts as on the CPU");

  const PairGradients<Scalar> incoming(P, options, missing, seed);
  const Buffer<Scalar> grad = batch.new_gradient(), expected_grad = batch.new_gradient();
  require_equal(
      cuda::preference_loss_backward(incoming.args(batch, list, options, expected, grad), nullptr),
      0, "error of the backward");
  require(!cpu::preference_loss_backward(
               incoming.args(batch, list, options, expected, expected_grad), kOneThread)
               .found(),
          "no error of the backward on the CPU");
  // The gradients of a sequence's pairs are added up without compensation.
  require_agreement(grad, expected_grad, "grad_token_logps as on the CPU",
                    how.has_indices ? 1e-14 : 0.0);

  for (int64_t p = 0; p < P; ++p) {
    if (list.weight(p) != 0.0) continue;
    require_equal(static_cast<double>(got.losses[p]), 0.0, "losses with a weight of 0");
    require_equal(static_cast<double>(got.slopes[p]), 0.0, "slopes with a weight of 0");
    require_equal(static_cast<double>(got.slopes[P + p]), 0.0, "slopes with a weight of 0");
  }
  if (contents == Contents::kInfinities || P > 5 || num_positions > 40) return;
  const DirectPairs direct = score_directly(batch, list, options);
  check_forward_directly(options, direct, got);
  check_backward_directly(batch, list, options, direct, incoming, grad);
}

std::vector<PairOptions> all_options() {
  std::vector<PairOptions> options;
  const PairLoss losses[] = {{LossType::kSigmoid, 2.0, 0.5, 0.0, 0.0},
                             {LossType::kSigmoid, 2.5, 0.3, 0.1, 0.1},
                             {LossType::kHinge, 1.5, 0.2, 0.0, 0.0},
                             {LossType::kIpo, 0.5, 0.1, 0.0, -0.05}};
  for (const PairLoss& loss : losses) {
    for (const Reduction reduction : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
      for (const SftReduction sft : {SftReduction::kSequence, SftReduction::kToken}) {
        // The ops do not allow a token-wise SFT term without a reduction.
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

// Options whose gradient depends on the numbers of pairs and tokens.
constexpr PairOptions kMeans{true,
                             {LossType::kSigmoid, 2.0, 0.5, 0.0, 0.0},
                             {Reduction::kMean, SftReduction::kToken, EmptyPolicy::kDrop, 0.5}};

template <typename Scalar>
void check_scalar(bool reduced) {
  const std::vector<PairOptions> options = all_options();
  uint64_t seed = 0;
  // For cheap sizes, all options and arrangements, with and without each gradient.
  for (size_t i = 0; i < options.size(); i += reduced ? 40 : 1) {
    for (int repeat = 0; repeat < 2; ++repeat) {
      check_pairs<Scalar>(5, 5, options[i], seed, arrangement_of(seed * 5 + 3, 5));
      ++seed;
    }
    check_pairs<Scalar>(3, 40, options[i], seed, arrangement_of(seed, 3));
    ++seed;
    check_pairs<Scalar>(1, 5, options[i], seed, arrangement_of(seed, 1), Contents::kAllEmpty);
    ++seed;
    check_pairs<Scalar>(5, 5, options[i], seed, arrangement_of(seed, 5), Contents::kInfinities);
    ++seed;
  }

  // P: none, one, a few, more than the threads of a block, several rounds of a block. T: none, one,
  // fewer than the threads of a warp, of a block, several rounds of a block.
  size_t next = 0;
  for (const int64_t P : {0, 1, 3, 5, 130, 1100}) {
    for (const int64_t num_positions : {0, 1, 2, 5, 40, 300}) {
      if (P == 1100 && num_positions > 2) continue;
      if (reduced && P * (num_positions + 1) > 300) continue;
      const int repeats = reduced ? 1 : P > 5 ? 3 : 8;
      for (int i = 0; i < repeats; ++i) {
        check_pairs<Scalar>(P, num_positions, i == 0 ? kMeans : options[next % options.size()],
                            seed, arrangement_of(i == 0 ? 0 : seed, P));
        ++seed;
        next += 7;
      }
    }
  }
  // With indices: so many sequences that each block of the grid has several; so many pairs that
  // each thread of a block has several; sequences without a pair.
  check_pairs<Scalar>(3, 1, kMeans, seed, {.has_indices = true, .has_weights = true, .S = 70});
  check_pairs<Scalar>(300, 3, kMeans, seed,
                      {.is_flat = true, .has_indices = true, .has_weights = true, .S = 5});
  check_pairs<Scalar>(0, 5, kMeans, seed, {.has_indices = true, .S = 3});
  // Weights of pairs without indices; a sequence that a block takes in several turns.
  check_pairs<Scalar>(2, 1100, kMeans, seed, {.is_flat = true, .has_weights = true});
}

// ---- edges ------------------------------------------------------------------------------------

// No pairs although there are sequences. A tensor without elements may have no memory.
void check_no_pairs_at_null() {
  describe("no pairs, without memory for indices, gradients and slopes");
  const PairBatch<float> batch({3, 5}, false, 1);
  const PairList list(0);
  const PairOutputs<float> outputs(3, 0, kMeans);
  PreferenceLossArgs forward = outputs.args(batch, list, kMeans);
  forward.losses = forward.logps = forward.rewards = forward.slopes = nullptr;
  require_equal(cuda::preference_loss(forward, nullptr), 0, "error of the forward");
  require_equal(outputs.loss[0], 0.0, "loss without pairs");
  const PairGradients<float> incoming(1, kMeans, 0, 1);
  const Buffer<float> grad = batch.new_gradient();
  PreferenceLossBackwardArgs backward = incoming.args(batch, list, kMeans, outputs, grad);
  backward.slopes = backward.grad_losses = backward.grad_logps = nullptr;
  require_equal(cuda::preference_loss_backward(backward, nullptr), 0, "error of the backward");
  for (int64_t i = 0; i < grad.size(); ++i) require_equal(grad[i], 0.0, "gradient without pairs");
}

// A slope of 0 stays 0 if its factor is infinite, and a pair with a weight of 0 adds nothing.
void check_saturated_pair(LossType type) {
  describe("a saturated pair, loss type %ld", static_cast<int64_t>(type));
  const Buffer<double> token_logps(2), slopes(2), sums(2), pair_values(2);
  const Buffer<double> loss(1), losses(1), sft_loss(1);
  const Buffer<int64_t> labels(2), counts(2);
  const Buffer<double> metrics(kNumMetrics);
  token_logps[1] = -kInfinity;
  labels[0] = labels[1] = 1;
  const auto require_no_slope = [&](double weight, double chosen_logp) {
    token_logps[0] = chosen_logp;
    const Buffer<double> weights(1);
    weights[0] = weight;
    require_equal(cuda::preference_loss({.dtype = DType::kFloat64,
                                         .token_logps = token_logps.data(),
                                         .token_strides = {1, 1},
                                         .targets = {labels.data(), {1, 1}, 2, 1, kIgnore, false},
                                         .sequences = {nullptr, 2},
                                         .pairs = {nullptr, weights.data(), 1},
                                         .average = false,
                                         .pair_loss = {type, 2.0, 0.5, 0.0, 0.5},
                                         .reduction = {Reduction::kMean, SftReduction::kSequence,
                                                       EmptyPolicy::kDrop, 0.0},
                                         .sums = sums.data(),
                                         .loss = loss.data(),
                                         .losses = losses.data(),
                                         .logps = pair_values.data(),
                                         .rewards = pair_values.data(),
                                         .sft_loss = sft_loss.data(),
                                         .metrics = metrics.data(),
                                         .slopes = slopes.data(),
                                         .counts = counts.data()},
                                        nullptr),
                  0, "error of the forward");
    require_equal(slopes[0], 0.0, "slope of chosen");
    require_equal(slopes[1], 0.0, "slope of rejected");
  };
  require_no_slope(1.0, -1.0);
  require_no_slope(-2.0, -1.0);
  require_no_slope(0.0, -kInfinity);  // the margin is NaN
  require_equal(loss[0], 0.0, "loss with a weight of 0");
  require_equal(sft_loss[0], 0.0, "sft_loss with a weight of 0");
}

// A pair with a sequence that does not exist is NaN. Other pairs are not affected, and the sequence
// is not read.
template <typename Scalar>
void check_wrong_indices(bool is_flat) {
  constexpr int64_t S = 6, P = 5, kWrong = 2;
  const PairOptions each{true,
                         {LossType::kSigmoid, 2.0, 0.5, 0.0, 0.0},
                         {Reduction::kNone, SftReduction::kSequence, EmptyPolicy::kDrop, 0.5}};
  const PairBatch<Scalar> batch({S, 9, is_flat}, false, 3);
  PairList list(P, S, true, false);
  // The gradients of pairs that share sequences with it, and of pairs that do not.
  const int64_t sequences[2 * P] = {0, 1, 5, 3, 0, 2, 2, 2, 3, 0};
  constexpr int64_t kGreatest = std::numeric_limits<int64_t>::max();
  for (const int64_t side : {0, 1}) {
    for (const int64_t wrong : {int64_t{-1}, S, kGreatest, -kGreatest - 1, int64_t{1} << 32}) {
      describe("%s, flat %d: index %ld on side %ld", DTypeOf<Scalar>::name, is_flat, wrong, side);
      std::copy(sequences, sequences + 2 * P, list.indices.data());
      const PairOutputs<Scalar> expected(S, P, each), got(S, P, each);
      const PairGradients<Scalar> incoming(P, each, 0, 3);
      const Buffer<Scalar> expected_grad = batch.new_gradient(), grad = batch.new_gradient();
      cuda::preference_loss(expected.args(batch, list, each), nullptr);
      cuda::preference_loss_backward(incoming.args(batch, list, each, expected, expected_grad),
                                     nullptr);
      const int64_t other = sequences[2 * kWrong + 1 - side];
      list.indices[2 * kWrong + side] = wrong;
      require_equal(cuda::preference_loss(got.args(batch, list, each), nullptr), 0,
                    "error of the forward");
      require_equal(
          cuda::preference_loss_backward(incoming.args(batch, list, each, got, grad), nullptr), 0,
          "error of the backward");
      for (int64_t p = 0; p < P; ++p) {
        const double loss = static_cast<double>(p == kWrong ? kNan : expected.loss[p]);
        require_close(static_cast<double>(got.loss[p]), loss, 0.0, "loss of each pair");
        require_equal(std::isnan(got.losses[p]), p == kWrong, "losses that are NaN");
      }
      require(std::isnan(got.logps[side * P + kWrong]), "logp of a sequence that does not exist");
      require(!std::isnan(got.logps[(1 - side) * P + kWrong]), "logp of the other");
      require_agreement(got.counts, expected.counts, "counts");
      const int64_t not_there = sequences[2 * kWrong + side];
      for (int64_t s = 0; s < S; ++s) {
        const auto [b, begin, end] = batch.range(s);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t i = b * batch.T + t;
          const bool is_valid = batch.targets().is_valid(b, t);
          if (s == other && is_valid) {
            require(std::isnan(grad[i]), "gradient of the other", static_cast<double>(grad[i]));
          } else if (s != not_there) {
            require_equal(static_cast<double>(grad[i]), static_cast<double>(expected_grad[i]),
                          "gradient of what is in no such pair");
          } else {
            require(std::isfinite(grad[i]), "gradient of what would have been in the pair");
          }
        }
      }
    }
  }
}

}  // namespace

void check_preference(bool reduced) {
  check_scalar<double>(reduced);
  check_scalar<float>(reduced);
  check_no_pairs_at_null();
  for (const LossType type : {LossType::kSigmoid, LossType::kHinge}) check_saturated_pair(type);
  check_wrong_indices<double>(false);
  check_wrong_indices<float>(true);
}

}  // namespace simpo_ext::kernel_tests
