// Sequence log-probs and the preference loss: rows, the flat layout, pairs by indices, weights, and
// the errors of wrong layouts. Every buffer has exactly the size that the contract states.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/kernels.h"
#include "threads.h"

namespace simpo_ext::test {
namespace {

constexpr int64_t kIgnore = -100;
constexpr int64_t kGreatest = std::numeric_limits<int64_t>::max();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr float kUnwritten = 12345.0f;

size_t index(int64_t i) { return static_cast<size_t>(i); }

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

constexpr PairLoss kSigmoid{LossType::kSigmoid, 2.0, 0.5, 0.1, 0.1};
constexpr LossReduction kMeanOfTokens{Reduction::kMean, SftReduction::kToken, EmptyPolicy::kDrop,
                                      0.5};

// Token log-probs of sequences, as rows or in one row.
struct Batch {
  // Sequences of T_ positions. In the flat layout they have padding around them, whose log-probs
  // are NaN and whose labels look valid.
  Batch(int64_t num_sequences, int64_t T_, bool is_flat, bool shift)
      : S(num_sequences), front(is_flat ? 3 : 0) {
    const int64_t positions = S * T_;
    const int64_t N = is_flat ? front + positions + 2 : positions;
    token_logps.assign(index(N), static_cast<float>(kNan));
    labels.assign(index(N), 1);
    for (int64_t i = 0; i < positions; ++i) {
      token_logps[index(front + i)] = -0.25f * static_cast<float>(i % 7);
      const bool predicts_none = shift && i % T_ == T_ - 1;
      const int64_t from = is_flat && shift ? i + 1 : i;  // without a shift, labels are aligned
      labels[index(front + i)] =
          (is_flat && predicts_none) || from % 5 == 0 ? kIgnore : 1 + from % 3;
    }
    if (is_flat) {
      for (int64_t s = 0; s <= S; ++s) cu_seqlens.push_back(front + s * T_);
      targets = {labels.data(), {N, 1}, 1, N, kIgnore, false};
    } else {
      targets = {labels.data(), {T_, 1}, S, T_, kIgnore, shift};
    }
  }

  Sequences sequences() const { return {cu_seqlens.empty() ? nullptr : cu_seqlens.data(), S}; }
  TokenStrides strides() const { return targets.strides; }

  int64_t S, front;
  std::vector<float> token_logps;
  std::vector<int64_t> labels, cu_seqlens;
  Targets targets;
};

struct Results {
  Results(const Batch& batch, int64_t P)
      : losses(index(P), kUnwritten),
        logps(index(2 * P), kUnwritten),
        rewards(index(2 * P), kUnwritten),
        slopes(index(2 * P), kUnwritten),
        grad(batch.token_logps.size(), 0.0f),
        metrics(kNumMetrics),
        sums(index(batch.S)),
        counts(index(batch.S)) {}

  LayoutError run_forward(const Batch& batch, const Pairs& pairs) {
    return cpu::preference_loss({.dtype = DType::kFloat32,
                                 .token_logps = batch.token_logps.data(),
                                 .token_strides = batch.strides(),
                                 .targets = batch.targets,
                                 .sequences = batch.sequences(),
                                 .pairs = pairs,
                                 .average = true,
                                 .pair_loss = kSigmoid,
                                 .reduction = kMeanOfTokens,
                                 .sums = sums.data(),
                                 .loss = &loss,
                                 .losses = losses.data(),
                                 .logps = logps.data(),
                                 .rewards = rewards.data(),
                                 .sft_loss = &sft_loss,
                                 .metrics = metrics.data(),
                                 .slopes = slopes.data(),
                                 .counts = counts.data()},
                                kThreads);
  }
  LayoutError run_backward(const Batch& batch, const Pairs& pairs) {
    return cpu::preference_loss_backward({.dtype = DType::kFloat32,
                                          .targets = batch.targets,
                                          .sequences = batch.sequences(),
                                          .pairs = pairs,
                                          .average = true,
                                          .reduction = kMeanOfTokens,
                                          .slopes = slopes.data(),
                                          .counts = counts.data(),
                                          .grad_loss = &one,
                                          .grad_loss_stride = 0,
                                          .grad_losses = losses.data(),
                                          .grad_losses_stride = 1,
                                          .grad_logps = nullptr,
                                          .grad_logps_stride = 0,
                                          .grad_sft_loss = nullptr,
                                          .grad_sft_loss_stride = 0,
                                          .grad_token_logps = grad.data()},
                                         kThreads);
  }
  void run(const Batch& batch, const Pairs& pairs) {
    require(!run_forward(batch, pairs).found(), "a layout without errors, forward");
    require(!run_backward(batch, pairs).found(), "a layout without errors, backward");
  }

  const float one = 1.0f;
  float loss = kUnwritten, sft_loss = kUnwritten;
  std::vector<float> losses, logps, rewards, slopes, grad;
  std::vector<double> metrics, sums;
  std::vector<int64_t> counts;
};

void check_preference_loss(int64_t P, int64_t T_) {
  context = "at P = " + std::to_string(P) + ", T = " + std::to_string(T_);
  const Batch rows(2 * P, T_, false, true), flat(2 * P, T_, true, true);
  Results of_rows(rows, P);
  of_rows.run(rows, {nullptr, nullptr, P});
  require(std::isfinite(of_rows.loss) && std::isfinite(of_rows.sft_loss), "the loss is finite",
          of_rows.loss);
  require(of_rows.metrics[kNumPairs] + of_rows.metrics[kDroppedPairs] == static_cast<double>(P),
          "every pair is counted");
  for (int64_t b = 0; b < 2 * P; ++b) {
    for (int64_t t = 0; t < T_; ++t) {
      const float g = of_rows.grad[index(b * T_ + t)];
      require(rows.targets.is_valid(b, t) ? std::isfinite(g) : g == 0.0f,
              "gradients stand at valid tokens", g);
    }
  }

  // The same sequences in one row, or the same pairs by indices, give the same bits.
  std::vector<int64_t> indices;
  for (int64_t p = 0; p < P; ++p) indices.insert(indices.end(), {p, P + p});
  const std::vector<double> ones(index(P), 1.0);
  Results of_flat(flat, P);
  of_flat.run(flat, {indices.data(), ones.data(), P});
  require(of_flat.loss == of_rows.loss && of_flat.sft_loss == of_rows.sft_loss, "the same losses",
          of_flat.loss, of_rows.loss);
  require(same_bits(of_flat.losses, of_rows.losses) && same_bits(of_flat.slopes, of_rows.slopes) &&
              same_bits(of_flat.rewards, of_rows.rewards) && of_flat.counts == of_rows.counts,
          "the same of each pair");
  for (size_t i = 0; i < flat.token_logps.size(); ++i) {
    const size_t at = i - index(flat.front);
    const float expected =
        i >= index(flat.front) && at < of_rows.grad.size() ? of_rows.grad[at] : 0;
    require(of_flat.grad[i] == expected, "the same gradient, and 0 at padding", of_flat.grad[i],
            expected);
  }
}

// The gradient of a sequence in several pairs is a sum. Weights of 0 and 2.
void check_shared_sequences() {
  context = "of shared sequences";
  const Batch batch(5, 6, true, false);
  // Sequence 4 is in no pair. Sequence 2 is on both sides of one.
  const std::vector<int64_t> indices{0, 1, 0, 3, 2, 2, 3, 0};
  const std::vector<double> weights{1.0, 2.0, -0.5, 0.0};
  Results together(batch, 4);
  together.run(batch, {indices.data(), weights.data(), 4});
  std::vector<double> sum(batch.token_logps.size(), 0.0);
  for (int64_t p = 0; p < 4; ++p) {
    std::vector<double> alone(4, 0.0);
    alone[index(p)] = weights[index(p)];
    Results of_one(batch, 4);
    of_one.run(batch, {indices.data(), alone.data(), 4});
    require(of_one.losses[index(p)] == together.losses[index(p)], "a weighted loss");
    for (int64_t q = 0; q < 4; ++q) {
      require(q == p || of_one.losses[index(q)] == 0.0f, "a loss without weight");
    }
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += of_one.grad[i];
  }
  for (size_t i = 0; i < sum.size(); ++i) {
    require(std::fabs(together.grad[i] - sum[i]) < 1e-6, "the sum of the pairs' gradients",
            together.grad[i], sum[i]);
  }
  for (int64_t t = 0; t < 6; ++t) {
    require(together.grad[index(batch.cu_seqlens[4] + t)] == 0.0f, "nothing for no pair");
  }
  require(together.losses[3] == 0.0f && together.slopes[3] == 0.0f, "a weight of 0");

  Results of_none(batch, 0);
  of_none.run(batch, {nullptr, nullptr, 0});
  for (const float g : of_none.grad) require(g == 0.0f, "nothing for no pairs", g);
}

void check_sequence_logps() {
  constexpr int64_t B = 3, T_ = 4;
  std::vector<double> token_logps(B * T_), logps(B), gradient(B * T_);
  std::vector<int64_t> labels(B * T_, 1), counts(B);
  for (size_t i = 0; i < token_logps.size(); ++i) token_logps[i] = -static_cast<double>(i);
  for (size_t t = 0; t < T_; ++t) labels[t] = kIgnore;  // the first sequence is empty
  labels[6] = kIgnore;
  const std::vector<int64_t> cu_seqlens{0, T_, 2 * T_, 3 * T_};
  for (const bool is_flat : {false, true}) {
    context = is_flat ? "in one row" : "in rows";
    const Targets rows{labels.data(), {T_, 1}, B, T_, kIgnore, false};
    const Targets targets =
        is_flat ? Targets{labels.data(), {B * T_, 1}, 1, B * T_, kIgnore, false} : rows;
    const Sequences sequences{is_flat ? cu_seqlens.data() : nullptr, B};
    require(!cpu::sequence_logps({.dtype = DType::kFloat64,
                                  .token_logps = token_logps.data(),
                                  .token_strides = targets.strides,
                                  .targets = targets,
                                  .sequences = sequences,
                                  .average = true,
                                  .logps = logps.data(),
                                  .counts = counts.data()},
                                 kThreads)
                 .found(),
            "a layout without errors");
    require(std::isnan(logps[0]) && counts[0] == 0, "an empty sequence is NaN");
    require(logps[1] == -(4.0 + 5.0 + 7.0) / 3 && counts[1] == 3, "mean of the valid tokens",
            logps[1]);
    require(logps[2] == -9.5 && counts[2] == 4, "mean of all tokens", logps[2]);
    const std::vector<double> upstream{1.0, 3.0, 8.0};
    require(!cpu::sequence_logps_backward({.dtype = DType::kFloat64,
                                           .targets = targets,
                                           .sequences = sequences,
                                           .average = true,
                                           .grad_logps = upstream.data(),
                                           .grad_stride = 1,
                                           .counts = counts.data(),
                                           .grad_token_logps = gradient.data()},
                                          kThreads)
                 .found(),
            "a layout without errors");
    const std::vector<double> expected{0, 0, 0, 0, 1, 1, 0, 1, 2, 2, 2, 2};
    for (size_t i = 0; i < expected.size(); ++i) {
      require(std::fabs(gradient[i] - expected[i]) < 1e-15, "gradient of a mean", gradient[i],
              expected[i]);
    }
  }
}

// ---- what is wrong with a layout --------------------------------------------------------------

void require_error(const LayoutError& got, const LayoutError& expected, const char* what) {
  require(got.kind == expected.kind, what, static_cast<double>(got.kind),
          static_cast<double>(expected.kind));
  require(got.index == expected.index, "its index", static_cast<double>(got.index),
          static_cast<double>(expected.index));
  require(got.value == expected.value, "its value", static_cast<double>(got.value),
          static_cast<double>(expected.value));
  require(got.bound == expected.bound, "what it was held against", static_cast<double>(got.bound),
          static_cast<double>(expected.bound));
}

// All functions that take a layout refuse it, before they write anything.
void require_refused(const Batch& batch, const Pairs& pairs, const LayoutError& expected,
                     const char* what) {
  context = what;
  Results results(batch, pairs.P);
  require_error(results.run_forward(batch, pairs), expected, "preference_loss");
  results.counts.assign(results.counts.size(), 1);
  require_error(results.run_backward(batch, pairs), expected, "preference_loss_backward");
  require(results.loss == kUnwritten && results.losses[0] == kUnwritten, "nothing is written");
  for (const float g : results.grad) require(g == 0.0f, "no gradient is written", g);
  if (expected.kind == LayoutError::Kind::kPair) return;

  std::vector<float> logps(index(batch.S), kUnwritten);
  require_error(cpu::sequence_logps({.dtype = DType::kFloat32,
                                     .token_logps = batch.token_logps.data(),
                                     .token_strides = batch.strides(),
                                     .targets = batch.targets,
                                     .sequences = batch.sequences(),
                                     .average = true,
                                     .logps = logps.data(),
                                     .counts = results.counts.data()},
                                    kThreads),
                expected, "sequence_logps");
  require(logps[0] == kUnwritten, "no logp is written");
  require_error(cpu::sequence_logps_backward({.dtype = DType::kFloat32,
                                              .targets = batch.targets,
                                              .sequences = batch.sequences(),
                                              .average = true,
                                              .grad_logps = logps.data(),
                                              .grad_stride = 1,
                                              .counts = results.counts.data(),
                                              .grad_token_logps = results.grad.data()},
                                             kThreads),
                expected, "sequence_logps_backward");
  for (const float g : results.grad) require(g == 0.0f, "no gradient is written", g);
  std::vector<int64_t> targets(batch.labels.size(), -5);
  const cpu::TargetError error = cpu::sequence_targets({.labels = batch.targets,
                                                        .num_labels = 9,
                                                        .sequences = batch.sequences(),
                                                        .targets = targets.data()});
  require_error(error.layout, expected, "sequence_targets");
  require(!error.label.found(), "no label is looked at");
  for (const int64_t target : targets) require(target == -5, "no target is written");
}

void check_layout_errors() {
  using Kind = LayoutError::Kind;
  const Batch good(4, 5, true, false);  // cu_seqlens are 3, 8, 13, 18, 23 of 25
  const std::vector<int64_t> indices{0, 1, 3, 2};
  const Pairs pairs{indices.data(), nullptr, 2};
  const struct {
    const char* what;
    int64_t index, value;
    LayoutError error;
  } wrongs[] = {
      {"cu_seqlens begin at -1", 0, -1, {Kind::kBegin, 0, -1, 0}},
      {"cu_seqlens begin far below", 0, -kGreatest - 1, {Kind::kBegin, 0, -kGreatest - 1, 0}},
      {"cu_seqlens decrease at once", 0, 9, {Kind::kOrder, 1, 8, 9}},
      {"cu_seqlens decrease", 2, 7, {Kind::kOrder, 2, 7, 8}},
      {"cu_seqlens decrease below 0", 2, -7, {Kind::kOrder, 2, -7, 8}},
      {"cu_seqlens decrease from far beyond", 3, kGreatest, {Kind::kOrder, 4, 23, kGreatest}},
      {"cu_seqlens end behind N", 4, 26, {Kind::kEnd, 4, 26, 25}},
      {"cu_seqlens end far behind", 4, kGreatest, {Kind::kEnd, 4, kGreatest, 25}},
  };
  for (const auto& wrong : wrongs) {
    Batch batch(4, 5, true, false);
    batch.cu_seqlens[index(wrong.index)] = wrong.value;
    require_refused(batch, pairs, wrong.error, wrong.what);
  }
  const Batch rows(4, 5, false, false);
  for (const Batch* batch : {&good, &rows}) {
    for (int64_t i = 0; i < 4; ++i) {
      for (const int64_t value : {int64_t{-1}, int64_t{4}, kGreatest, -kGreatest - 1}) {
        std::vector<int64_t> wrong = indices;
        wrong[index(i)] = value;
        require_refused(*batch, {wrong.data(), nullptr, 2}, {Kind::kPair, i, value, 4},
                        "an index of a pair");
      }
    }
  }
  // The first of several errors is reported, and cu_seqlens before pairs.
  Batch several(4, 5, true, false);
  several.cu_seqlens = {-2, -3, 13, 12, 99};
  const std::vector<int64_t> none{7, 8, 9, 10};
  require_refused(several, {none.data(), nullptr, 2}, {Kind::kBegin, 0, -2, 0}, "all wrong");
  several.cu_seqlens[0] = 0;
  require_refused(several, {none.data(), nullptr, 2}, {Kind::kOrder, 1, -3, 0}, "all but one");
  require_refused(good, {none.data(), nullptr, 2}, {Kind::kPair, 0, 7, 4},
                  "wrong pairs, without cu_seqlens");
}

}  // namespace

void check_pairs() {
  if (!kThreadsAlone) {
    check_sequence_logps();
    check_shared_sequences();
    check_layout_errors();
  }
  check_preference_loss(0, 4);
  check_preference_loss(5, 1);
  check_preference_loss(3, 40);
  check_preference_loss(40, 9000);
}

}  // namespace simpo_ext::test
