// A batch for the preference loss and sequence_logps, and all their outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {

struct PairOptions {
  bool average;
  PairLoss pair_loss;
  LossReduction reduction;
};

enum class Contents {
  kOrdinary,   // some sequences without a valid token
  kAllEmpty,   // no sequence has a valid token
  kInfinities  // log-probs of -inf, on one side of a pair and on both
};

// The sums over the valid tokens of a sequence, one token after another.
struct DirectSum {
  double sum;
  int64_t count;
};

struct SequenceShape {
  int64_t S;
  int64_t T;  // positions of each sequence; in the flat layout, of the longest
  bool is_flat = false;
};

// Sequences of token log-probs, as rows or in one row.
template <typename Scalar>
class PairBatch {
 public:
  PairBatch(SequenceShape shape, bool shift, uint64_t seed, Contents contents = Contents::kOrdinary)
      : PairBatch(shape, shape.is_flat ? cut(shape, seed) : std::vector<int64_t>(),
                  shift && !shape.is_flat, seed, contents) {}

  Targets targets() const { return {labels_.data(), label_strides_, B, T, kIgnore, shift_}; }
  Sequences sequences() const { return {is_flat ? cu_seqlens.data() : nullptr, S}; }
  TokenRange range(int64_t s) const {
    return is_flat ? TokenRange{0, cu_seqlens[s], cu_seqlens[s + 1]} : TokenRange{s, 0, T};
  }
  const Scalar* token_logps() const { return token_logps_.data(); }
  double token_logp(int64_t b, int64_t t) const {
    return static_cast<double>(token_logps_[token_strides.offset(b, t)]);
  }
  DirectSum sum_directly(int64_t s) const {
    const auto [b, begin, end] = range(s);
    DirectSum total{0.0, 0};
    for (int64_t t = begin; t < end; ++t) {
      if (!targets().is_valid(b, t)) continue;
      total.sum += token_logp(b, t);
      ++total.count;
    }
    return total;
  }
  // Positions that have a label.
  int64_t num_labels() const {
    if (is_flat) return cu_seqlens[S] - cu_seqlens[0];
    return B * (shift_ && T > 0 ? T - 1 : T);
  }
  // Memory for the gradient of token log-probs. In the flat layout it holds zeros, as its contract
  // requires.
  Buffer<Scalar> new_gradient() const {
    Buffer<Scalar> gradient(B * T);
    if (is_flat) std::fill_n(gradient.data(), gradient.size(), Scalar(0));
    return gradient;
  }

  static constexpr DType kDType = DTypeOf<Scalar>::value;
  const int64_t S;
  const bool is_flat;
  const Buffer<int64_t> cu_seqlens;
  const int64_t B, T;
  const TokenStrides token_strides;
  int64_t num_valid = 0;

 private:
  PairBatch(SequenceShape shape, const std::vector<int64_t>& cuts, bool shift, uint64_t seed,
            Contents contents)
      : S(shape.S),
        is_flat(shape.is_flat),
        cu_seqlens(static_cast<int64_t>(cuts.size())),
        B(is_flat ? 1 : S),
        T(is_flat ? cuts.back() + static_cast<int64_t>(seed % 4) : shape.T),
        // Transposed, or every other column of a wider tensor.
        token_strides(seed % 2 == 0 ? TokenStrides{1, B} : TokenStrides{2 * T + 3, 2}),
        label_strides_(seed % 3 == 0 ? TokenStrides{T, 1} : TokenStrides{T + 5, 1}),
        shift_(shift),
        token_logps_(extent(token_strides)),
        labels_(extent(label_strides_)) {
    std::copy(cuts.begin(), cuts.end(), cu_seqlens.data());
    std::mt19937_64 random(seed);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    // Log-probs that are masked or in no sequence must not be read: they would make a sum NaN.
    for (int64_t i = 0; i < token_logps_.size(); ++i) token_logps_[i] = static_cast<Scalar>(kNan);
    for (int64_t i = 0; i < labels_.size(); ++i) labels_[i] = 5;
    for (int64_t s = 0; s < S; ++s) {
      const auto [b, begin, end] = range(s);
      const bool is_empty =
          contents == Contents::kAllEmpty || (s + static_cast<int64_t>(seed)) % 5 == 4;
      for (int64_t t = begin; t < end; ++t) {
        const bool is_masked = is_empty || uniform(random) < 0.3;
        // With shift, the first label scores no position.
        if (!(shift && t == 0)) labels_[label_strides_.offset(b, t)] = is_masked ? kIgnore : t % 9;
      }
      for (int64_t t = begin; t < end; ++t) {
        if (!targets().is_valid(b, t)) continue;
        // All negative, like a model's log-probs: sums that cancel would hide errors.
        double logp = -3.0 * uniform(random) * uniform(random);
        if (contents == Contents::kInfinities && t % 4 == 0 && s % 3 == 0) logp = -kInfinity;
        token_logps_[token_strides.offset(b, t)] = static_cast<Scalar>(logp);
        ++num_valid;
      }
    }
  }

  // Padding at the beginning or none; sequences of all lengths, some without a position.
  static std::vector<int64_t> cut(SequenceShape shape, uint64_t seed) {
    std::mt19937_64 random(seed + 1);
    std::vector<int64_t> cuts{static_cast<int64_t>(seed / 2 % 3)};
    for (int64_t s = 0; s < shape.S; ++s) {
      const int64_t length = static_cast<int64_t>(random() % static_cast<uint64_t>(shape.T + 1));
      cuts.push_back(cuts.back() + (s % 4 == 0 ? shape.T : s % 7 == 3 ? 0 : length));
    }
    return cuts;
  }

  int64_t extent(TokenStrides strides) const {
    return B * T == 0 ? 0 : strides.offset(B - 1, T - 1) + 1;
  }

  TokenStrides label_strides_;
  bool shift_;
  Buffer<Scalar> token_logps_;
  Buffer<int64_t> labels_;
};

// The pairs of S sequences. With indices, some sequences are in several pairs, some in none, and
// some in a pair with themselves.
class PairList {
 public:
  PairList(int64_t P, int64_t S, bool has_indices, bool has_weights, uint64_t seed = 0)
      : P(P),
        indices(has_indices ? 2 * P : 0),
        weights(has_weights ? P : 0),
        has_indices_(has_indices),
        has_weights_(has_weights) {
    std::mt19937_64 random(seed + 3);
    const auto any_but_one = [&] {
      const int64_t sequence = static_cast<int64_t>(random() % static_cast<uint64_t>(S));
      return sequence == S / 2 ? 0 : sequence;
    };
    for (int64_t p = 0; has_indices && p < P; ++p) {
      indices[2 * p] = any_but_one();
      indices[2 * p + 1] = p % 4 == 3 ? indices[2 * p] : any_but_one();
    }
    for (int64_t p = 0; has_weights && p < P; ++p) {
      const double choices[] = {0.0, -0.75, 2.5, 1.0};
      weights[p] = choices[random() % 4];
    }
  }
  // Pair p has sequences p and P + p, and weight 1.
  explicit PairList(int64_t P) : PairList(P, 2 * P, false, false) {}

  Pairs pairs() const {
    return {has_indices_ ? indices.data() : nullptr, has_weights_ ? weights.data() : nullptr, P};
  }
  int64_t chosen(int64_t p) const { return has_indices_ ? indices[2 * p] : p; }
  int64_t rejected(int64_t p) const { return has_indices_ ? indices[2 * p + 1] : P + p; }
  double weight(int64_t p) const { return has_weights_ ? weights[p] : 1.0; }

  const int64_t P;
  const Buffer<int64_t> indices;  // [P, 2]
  const Buffer<double> weights;

 private:
  bool has_indices_, has_weights_;
};

template <typename Scalar>
struct PairOutputs {
  PairOutputs(int64_t S, int64_t P, const PairOptions& options)
      : sums(S),
        loss(options.reduction.reduction == Reduction::kNone ? P : 1),
        losses(P),
        logps(2 * P),
        rewards(2 * P),
        sft_loss(loss.size()),
        slopes(2 * P),
        metrics(kNumMetrics),
        counts(S) {}

  PreferenceLossArgs args(const PairBatch<Scalar>& batch, const PairList& list,
                          const PairOptions& options) const {
    return {.dtype = batch.kDType,
            .token_logps = batch.token_logps(),
            .token_strides = batch.token_strides,
            .targets = batch.targets(),
            .sequences = batch.sequences(),
            .pairs = list.pairs(),
            .average = options.average,
            .pair_loss = options.pair_loss,
            .reduction = options.reduction,
            .sums = sums.data(),
            .loss = loss.data(),
            .losses = losses.data(),
            .logps = logps.data(),
            .rewards = rewards.data(),
            .sft_loss = sft_loss.data(),
            .metrics = metrics.data(),
            .slopes = slopes.data(),
            .counts = counts.data()};
  }

  const Buffer<double> sums;
  const Buffer<Scalar> loss, losses, logps, rewards, sft_loss, slopes;
  const Buffer<double> metrics;
  const Buffer<int64_t> counts;
};

// Incoming gradients of the four outputs. If bit i of missing is set, the i-th is null.
template <typename Scalar>
struct PairGradients {
  PairGradients(int64_t P, const PairOptions& options, unsigned missing, uint64_t seed)
      : missing(missing),
        stride(options.reduction.reduction == Reduction::kNone ? 2 : 0),
        loss(stride == 0 ? 1 : 2 * P),
        losses(3 * P),
        logps(2 * P),
        sft_loss(loss.size()) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (const Buffer<Scalar>* buffer : {&loss, &losses, &logps, &sft_loss}) {
      for (int64_t i = 0; i < buffer->size(); ++i)
        (*buffer)[i] = static_cast<Scalar>(normal(random));
    }
    for (int64_t p = 0; p < P; p += 4) losses[3 * p] = Scalar(0);
  }

  PreferenceLossBackwardArgs args(const PairBatch<Scalar>& batch, const PairList& list,
                                  const PairOptions& options, const PairOutputs<Scalar>& forward,
                                  const Buffer<Scalar>& result) const {
    const auto unless_missing = [&](int i, const Buffer<Scalar>& buffer) {
      return (missing >> i & 1u) != 0 ? nullptr : buffer.data();
    };
    return {.dtype = batch.kDType,
            .targets = batch.targets(),
            .sequences = batch.sequences(),
            .pairs = list.pairs(),
            .average = options.average,
            .reduction = options.reduction,
            .slopes = forward.slopes.data(),
            .counts = forward.counts.data(),
            .grad_loss = unless_missing(0, loss),
            .grad_loss_stride = stride,
            .grad_losses = unless_missing(1, losses),
            .grad_losses_stride = 3,
            .grad_logps = unless_missing(2, logps),
            .grad_logps_stride = 1,
            .grad_sft_loss = unless_missing(3, sft_loss),
            .grad_sft_loss_stride = stride,
            .grad_token_logps = result.data()};
  }

  // 0 if it is missing.
  double of_loss(int64_t p) const { return at(0, loss, p * stride); }
  double of_losses(int64_t p) const { return at(1, losses, 3 * p); }
  double of_logps(int64_t i) const { return at(2, logps, i); }
  double of_sft_loss(int64_t p) const { return at(3, sft_loss, p * stride); }

  const unsigned missing;
  const int64_t stride;
  const Buffer<Scalar> loss, losses, logps, sft_loss;

 private:
  double at(int i, const Buffer<Scalar>& buffer, int64_t index) const {
    return (missing >> i & 1u) != 0 ? 0.0 : static_cast<double>(buffer[index]);
  }
};

template <typename Scalar>
SequenceLogpsArgs sequence_args(const PairBatch<Scalar>& batch, bool average,
                                const Buffer<Scalar>& logps, const Buffer<int64_t>& counts) {
  return {.dtype = batch.kDType,
          .token_logps = batch.token_logps(),
          .token_strides = batch.token_strides,
          .targets = batch.targets(),
          .sequences = batch.sequences(),
          .average = average,
          .logps = logps.data(),
          .counts = counts.data()};
}

template <typename Scalar>
SequenceLogpsBackwardArgs sequence_backward_args(const PairBatch<Scalar>& batch, bool average,
                                                 const Buffer<Scalar>& grad_logps, int64_t stride,
                                                 const Buffer<int64_t>& counts,
                                                 const Buffer<Scalar>& result) {
  return {.dtype = batch.kDType,
          .targets = batch.targets(),
          .sequences = batch.sequences(),
          .average = average,
          .grad_logps = grad_logps.data(),
          .grad_stride = stride,
          .counts = counts.data(),
          .grad_token_logps = result.data()};
}

}  // namespace simpo_ext::kernel_tests
