// sequence_targets compared with a plain loop; sequence_logps and its gradient compared with the
// CPU kernels and plain sums; and the effect of wrong cu_seqlens on these and on the preference
// loss.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/kernels.h"
#include "kernels/agreement.h"
#include "kernels/buffers.h"
#include "kernels/pair_batch.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {
namespace {

constexpr int64_t kGreatest = std::numeric_limits<int64_t>::max();

// ---- sequence_targets -------------------------------------------------------------------------

// A row of labels, and its cu_seqlens.
struct LabelRow {
  LabelRow(const std::vector<int64_t>& given_cuts, int64_t padding_behind, int64_t stride,
           bool shift, uint64_t seed)
      : cuts(given_cuts),
        N(cuts.back() + padding_behind),
        labels(N == 0 ? 0 : (N - 1) * stride + 1),
        targets{labels.data(), {kGreatest, stride}, 1, N, -7, shift} {
    std::mt19937_64 random(seed);
    // Some are ignored, and some out of range, which these kernels do not check.
    for (int64_t i = 0; i < labels.size(); ++i) {
      labels[i] = static_cast<int64_t>(random() % 4 == 0 ? -7 : random() % 9);
    }
  }

  SequenceTargetsArgs args(const Buffer<int64_t>& result, const std::vector<int64_t>& at) const {
    return {.labels = targets,
            .num_labels = 9,
            .sequences = {at.data(), static_cast<int64_t>(at.size()) - 1},
            .targets = result.data()};
  }

  std::vector<int64_t> cuts;  // a copy without capacity beyond its elements
  int64_t N;
  Buffer<int64_t> labels;
  Targets targets;
};

std::vector<int64_t> cuts_of_lengths(int64_t front, const std::vector<int64_t>& lengths) {
  std::vector<int64_t> cuts{front};
  for (const int64_t length : lengths) cuts.push_back(cuts.back() + length);
  return cuts;
}

std::vector<int64_t> targets_directly(const LabelRow& row) {
  std::vector<int64_t> expected(static_cast<size_t>(row.N), row.targets.ignore_index);
  for (size_t s = 0; s + 1 < row.cuts.size(); ++s) {
    for (int64_t t = row.cuts[s]; t < row.cuts[s + 1]; ++t) {
      const int64_t from = row.targets.shift ? t + 1 : t;
      if (from == row.cuts[s + 1]) continue;
      expected[static_cast<size_t>(t)] = row.labels[from * row.targets.strides.t];
    }
  }
  return expected;
}

void check_targets(const std::vector<int64_t>& cuts, int64_t padding_behind, bool shift,
                   uint64_t seed) {
  const int64_t stride = seed % 2 == 0 ? 1 : 3;
  describe("sequence_targets, S %zu, first cut %ld, last %ld, padding %ld, stride %ld, shift %d",
           cuts.size() - 1, cuts.front(), cuts.back(), padding_behind, stride, shift);
  const LabelRow row(cuts, padding_behind, stride, shift, seed);
  const std::vector<int64_t> expected = targets_directly(row);
  const Buffer<int64_t> got(row.N), on_cpu(row.N);
  require_equal(cuda::sequence_targets(row.args(got, row.cuts), nullptr), 0, "error");
  const cpu::TargetError error = cpu::sequence_targets(row.args(on_cpu, row.cuts));
  require(!error.layout.found() && !error.label.found(), "no error on the CPU");
  for (int64_t t = 0; t < row.N; ++t) {
    const double target = static_cast<double>(expected[static_cast<size_t>(t)]);
    require_equal(static_cast<double>(got[t]), target, "target");
    require_equal(static_cast<double>(on_cpu[t]), target, "target on the CPU");
  }
}

void check_all_targets(bool reduced) {
  uint64_t seed = 0;
  for (const bool shift : {false, true}) {
    for (const int64_t padding : {0, 5}) {
      check_targets({padding}, padding, shift, seed++);  // no sequence
      check_targets(cuts_of_lengths(padding, {0}), 0, shift, seed++);
      check_targets(cuts_of_lengths(padding, {1}), padding, shift, seed++);
      check_targets(cuts_of_lengths(padding, {4, 0, 1, 0, 0, 2, 7, 1}), padding, shift, seed++);
    }
    // More sequences than the first dimension of a grid holds, with a block that has none.
    check_targets(cuts_of_lengths(1, std::vector<int64_t>(65, 2)), 3, shift, seed++);
    // Ends at and near those of blocks; several blocks for each sequence, and several turns.
    check_targets(cuts_of_lengths(3, {255, 256, 257}), 2, shift, seed++);
    check_targets(cuts_of_lengths(0, {1023, 5, 1500}), 700, shift, seed++);
    if (!reduced) check_targets(cuts_of_lengths(2, {2047, 0, 2051}), 900, shift, seed++);
  }
}

// A GPU copies labels that are out of range or ignored. The CPU reports the first one out of range.
void check_labels_out_of_range() {
  for (const int64_t label : {int64_t{-1}, int64_t{9}, kGreatest, -kGreatest - 1}) {
    describe("sequence_targets of label %ld", label);
    LabelRow row({1, 4, 9}, 1, 1, true, 5);
    const Buffer<int64_t> got(row.N), on_cpu(row.N);
    // The labels of padding and of first positions score nothing.
    for (const int64_t unused : {0, 1, 4, 9}) row.labels[unused] = label;
    require(!cpu::sequence_targets(row.args(on_cpu, row.cuts)).label.found(), "no label error");
    row.labels[6] = label;
    const LabelError error = cpu::sequence_targets(row.args(on_cpu, row.cuts)).label;
    require(error.found() && error.b == 0, "a label error", static_cast<double>(error.b));
    require_equal(static_cast<double>(error.position), 6, "its position");
    require(error.label == label, "the label");
    require_equal(cuda::sequence_targets(row.args(got, row.cuts), nullptr), 0, "error");
    const std::vector<int64_t> expected = targets_directly(row);
    for (int64_t t = 0; t < row.N; ++t) {
      require(got[t] == expected[static_cast<size_t>(t)], "target", static_cast<double>(got[t]));
    }
  }
}

// ---- sequence_logps ---------------------------------------------------------------------------

template <typename Scalar>
void check_logps(int64_t S, int64_t num_positions, bool is_flat, bool average, uint64_t seed) {
  describe("sequence_logps of %s, S %ld, T %ld, flat %d, average %d, seed %lu",
           DTypeOf<Scalar>::name, S, num_positions, is_flat, average, seed);
  const PairBatch<Scalar> batch({S, num_positions, is_flat}, seed % 2 == 1, seed / 2);
  const Buffer<Scalar> logps(S), expected_logps(S);
  const Buffer<int64_t> counts(S), expected_counts(S);
  require_equal(cuda::sequence_logps(sequence_args(batch, average, logps, counts), nullptr), 0,
                "error of the forward");
  require(!cpu::sequence_logps(sequence_args(batch, average, expected_logps, expected_counts),
                               kOneThread)
               .found(),
          "no error of the forward on the CPU");
  require_agreement(logps, expected_logps, "logps as on the CPU");
  require_agreement(counts, expected_counts, "counts as on the CPU");
  for (int64_t s = 0; s < S; ++s) {
    const auto [sum, count] = batch.sum_directly(s);
    require_equal(static_cast<double>(counts[s]), static_cast<double>(count), "counts");
    const double logp = count == 0 ? kNan : average ? sum / static_cast<double>(count) : sum;
    // The sum above is not compensated.
    require_close(static_cast<double>(logps[s]), logp,
                  (2 * kUnit<Scalar> + 300 * kUnit<double>)*std::fabs(logp), "logps");
  }

  constexpr int64_t kStride = 3;
  const Buffer<Scalar> incoming(S * kStride);
  const Buffer<Scalar> grad = batch.new_gradient(), expected_grad = batch.new_gradient();
  for (int64_t s = 0; s < S; ++s) incoming[s * kStride] = static_cast<Scalar>(0.3 * s - 1.0);
  require_equal(
      cuda::sequence_logps_backward(
          sequence_backward_args(batch, average, incoming, kStride, counts, grad), nullptr),
      0, "error of the backward");
  require(!cpu::sequence_logps_backward(
               sequence_backward_args(batch, average, incoming, kStride, counts, expected_grad),
               kOneThread)
               .found(),
          "no error of the backward on the CPU");
  require_agreement(grad, expected_grad, "grad_token_logps as on the CPU");
  std::vector<double> expected(static_cast<size_t>(grad.size()), 0.0);
  for (int64_t s = 0; s < S; ++s) {
    const auto [b, begin, end] = batch.range(s);
    for (int64_t t = begin; t < end; ++t) {
      if (!batch.targets().is_valid(b, t)) continue;
      const double g = static_cast<double>(incoming[s * kStride]);
      expected[static_cast<size_t>(b * batch.T + t)] =
          average ? g / static_cast<double>(counts[s]) : g;
    }
  }
  for (int64_t i = 0; i < grad.size(); ++i) {
    const double value = expected[static_cast<size_t>(i)];
    require_close(static_cast<double>(grad[i]), value, 2 * kUnit<Scalar> * std::fabs(value),
                  "grad_token_logps");
  }
}

template <typename Scalar>
void check_scalar(bool reduced) {
  // S: none, a few, more than the first dimension of a grid holds. T: as in preference.cpp, and
  // several blocks for each sequence.
  uint64_t seed = 0;
  for (const int64_t S : {0, 2, 6, 10, 260}) {
    for (const int64_t num_positions : {0, 1, 2, 5, 40, 300}) {
      if (reduced && S * (num_positions + 1) > 300) continue;
      for (const bool is_flat : {false, true}) {
        check_logps<Scalar>(S, num_positions, is_flat, seed % 4 < 2, seed);
        ++seed;
      }
    }
  }
  check_logps<Scalar>(2, 1100, true, true, seed);
}

// ---- cu_seqlens that are wrong ----------------------------------------------------------------

struct WrongCut {
  const char* what;
  int64_t index, value;
  int64_t first, last;  // the sequences that are wrong because of it
};

// A sequence that is out of range is NaN and is not read. Other sequences are not affected.
template <typename Scalar>
void check_wrong_cuts() {
  constexpr int64_t S = 8, P = S / 2;
  // Sequence s is only in pair s % P. There is no reduction, since a mean would be NaN.
  const PairOptions each{true,
                         {LossType::kSigmoid, 2.0, 0.5, 0.0, 0.0},
                         {Reduction::kNone, SftReduction::kSequence, EmptyPolicy::kDrop, 0.5}};
  const PairBatch<Scalar> batch({S, 9, true}, false, 8);
  const std::vector<int64_t> cuts(batch.cu_seqlens.data(), batch.cu_seqlens.data() + S + 1);
  const LabelRow labels(cuts, batch.T - cuts.back(), 1, true, 9);
  const PairList list(P);
  const PairGradients<Scalar> incoming(P, each, 0, 3);

  struct Results {
    Results(const PairBatch<Scalar>& batch, const PairOptions& options)
        : logps(S),
          counts(S),
          pairs(S, P, options),
          sequence_grad(batch.new_gradient()),
          pair_grad(batch.new_gradient()),
          targets(batch.T) {}
    const Buffer<Scalar> logps;
    const Buffer<int64_t> counts;
    const PairOutputs<Scalar> pairs;
    const Buffer<Scalar> sequence_grad, pair_grad;
    const Buffer<int64_t> targets;
  };
  const auto run = [&](const Results& to) {
    require_equal(cuda::sequence_logps(sequence_args(batch, true, to.logps, to.counts), nullptr), 0,
                  "error of sequence_logps");
    require_equal(
        cuda::sequence_logps_backward(
            sequence_backward_args(batch, true, incoming.logps, 1, to.counts, to.sequence_grad),
            nullptr),
        0, "error of sequence_logps_backward");
    require_equal(cuda::preference_loss(to.pairs.args(batch, list, each), nullptr), 0,
                  "error of preference_loss");
    require_equal(cuda::preference_loss_backward(
                      incoming.args(batch, list, each, to.pairs, to.pair_grad), nullptr),
                  0, "error of preference_loss_backward");
    const std::vector<int64_t> at(batch.cu_seqlens.data(), batch.cu_seqlens.data() + S + 1);
    require_equal(cuda::sequence_targets(labels.args(to.targets, at), nullptr), 0,
                  "error of sequence_targets");
  };
  const Results expected(batch, each);
  run(expected);

  const WrongCut wrongs[] = {
      {"negative at the beginning", 0, -1, 0, 0},
      {"far below 0", 0, -kGreatest - 1, 0, 0},
      {"beyond N", S, batch.T + 1, S - 1, S - 1},
      {"far beyond N", S, kGreatest, S - 1, S - 1},
      {"past 2^32", S, (int64_t{1} << 32) + cuts.back(), S - 1, S - 1},
      {"decreasing at the beginning", 0, cuts[1] + 1, 0, 0},
      {"decreasing at the end", S, cuts[S - 1] - 1, S - 1, S - 1},
      {"negative within", 4, -2, 3, 4},
      {"beyond N within", 4, batch.T + 2, 3, 4},
  };
  for (const WrongCut& wrong : wrongs) {
    describe("%s, cu_seqlens %s", DTypeOf<Scalar>::name, wrong.what);
    const auto is_wrong = [&](int64_t s) { return s >= wrong.first && s <= wrong.last; };
    const Results got(batch, each);
    batch.cu_seqlens[wrong.index] = wrong.value;
    run(got);
    batch.cu_seqlens[wrong.index] = cuts[static_cast<size_t>(wrong.index)];
    for (int64_t s = 0; s < S; ++s) {
      const int64_t p = s % P;
      const bool is_of_wrong_pair = is_wrong(p) || is_wrong(P + p);
      const double logp = is_wrong(s) ? kNan : static_cast<double>(expected.logps[s]);
      require_close(static_cast<double>(got.logps[s]), logp, 0.0, "logps");
      require_close(static_cast<double>(got.pairs.logps[s]), logp, 0.0, "logps of pairs");
      const int64_t count = is_wrong(s) ? 1 : expected.counts[s];
      require(got.counts[s] == count, "counts", static_cast<double>(got.counts[s]));
      require(got.pairs.counts[s] == count, "counts of pairs");
      // Dropped if the other sequence is empty.
      const int64_t other = s < P ? s + P : s - P;
      const bool is_counted = count > 0 && (is_wrong(other) || expected.counts[other] > 0);
      const double loss = is_of_wrong_pair && is_counted ? kNan
                          : is_of_wrong_pair ? 0.0
                                             : static_cast<double>(expected.pairs.loss[p]);
      require_close(static_cast<double>(got.pairs.loss[p]), loss, 0.0, "loss of each pair");
      const auto [b, begin, end] = batch.range(s);
      for (int64_t t = begin; t < end; ++t) {
        const bool is_valid = batch.targets().is_valid(b, t);
        require_equal(static_cast<double>(got.sequence_grad[t]),
                      is_wrong(s) ? 0.0 : static_cast<double>(expected.sequence_grad[t]),
                      "gradient of sequence_logps");
        if (is_of_wrong_pair && is_counted && is_valid && !is_wrong(s)) {
          require(std::isnan(got.pair_grad[t]), "gradient of a pair that is NaN");
        } else {
          require_equal(static_cast<double>(got.pair_grad[t]),
                        is_wrong(s) ? 0.0 : static_cast<double>(expected.pair_grad[t]),
                        "gradient of another pair");
        }
        const int64_t target = is_wrong(s) ? labels.targets.ignore_index : expected.targets[t];
        require(got.targets[t] == target, "targets", static_cast<double>(got.targets[t]));
      }
    }
  }
}

}  // namespace

void check_sequences(bool reduced) {
  check_all_targets(reduced);
  check_labels_out_of_range();
  check_scalar<double>(reduced);
  check_scalar<float>(reduced);
  if (!reduced) check_wrong_cuts<double>();
  check_wrong_cuts<float>();
}

}  // namespace simpo_ext::kernel_tests
