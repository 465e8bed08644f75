// A batch for the preference loss and sequence_logps, and every output they have.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

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
  kAllEmpty,   // no sequence with one
  kInfinities  // log-probs of -inf, on one side of a pair and on both
};

// Of 2P sequences, or B in sequence_logps.
template <typename Scalar>
class PairBatch {
 public:
  PairBatch(int64_t B, int64_t num_positions, bool shift, uint64_t seed,
            Contents contents = Contents::kOrdinary)
      : B(B),
        T(num_positions),
        // Transposed, or every other column of a wider tensor.
        token_strides(seed % 2 == 0 ? TokenStrides{1, B} : TokenStrides{2 * T + 3, 2}),
        label_strides_(seed % 3 == 0 ? TokenStrides{T, 1} : TokenStrides{T + 5, 1}),
        shift_(shift),
        token_logps_(extent(token_strides)),
        labels_(extent(label_strides_)) {
    std::mt19937_64 random(seed);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    // What is masked is not to be read: it would make a sum NaN.
    for (int64_t i = 0; i < token_logps_.size(); ++i) token_logps_[i] = static_cast<Scalar>(kNan);
    for (int64_t i = 0; i < labels_.size(); ++i) labels_[i] = 5;
    for (int64_t b = 0; b < B; ++b) {
      const bool is_empty =
          contents == Contents::kAllEmpty || (b + static_cast<int64_t>(seed)) % 5 == 4;
      for (int64_t t = 0; t < T; ++t) {
        const bool is_masked = is_empty || uniform(random) < 0.3;
        // With shift the first label belongs to no position.
        if (!(shift && t == 0)) labels_[label_strides_.offset(b, t)] = is_masked ? kIgnore : t % 9;
      }
      for (int64_t t = 0; t < T; ++t) {
        if (!targets().is_valid(b, t)) continue;
        // Sums that cancel would hide errors; log-probs of a model do not.
        double logp = -3.0 * uniform(random) * uniform(random);
        if (contents == Contents::kInfinities && t % 4 == 0 && b % 3 == 0) logp = -kInfinity;
        token_logps_[token_strides.offset(b, t)] = static_cast<Scalar>(logp);
        ++num_valid;
      }
    }
  }

  Targets targets() const { return {labels_.data(), label_strides_, B, T, kIgnore, shift_}; }
  const Scalar* token_logps() const { return token_logps_.data(); }
  double token_logp(int64_t b, int64_t t) const {
    return static_cast<double>(token_logps_[token_strides.offset(b, t)]);
  }
  // Positions for which a label is there.
  int64_t num_labels() const { return B * (shift_ && T > 0 ? T - 1 : T); }

  static constexpr DType kDType = DTypeOf<Scalar>::value;
  const int64_t B, T;
  const TokenStrides token_strides;
  int64_t num_valid = 0;

 private:
  int64_t extent(TokenStrides strides) const {
    return B * T == 0 ? 0 : strides.offset(B - 1, T - 1) + 1;
  }

  TokenStrides label_strides_;
  bool shift_;
  Buffer<Scalar> token_logps_;
  Buffer<int64_t> labels_;
};

template <typename Scalar>
struct PairOutputs {
  PairOutputs(int64_t P, const PairOptions& options)
      : P(P),
        sums(2 * P),
        loss(options.reduction.reduction == Reduction::kNone ? P : 1),
        losses(P),
        logps(2 * P),
        rewards(2 * P),
        sft_loss(loss.size()),
        slopes(P),
        metrics(kNumMetrics),
        counts(2 * P) {}

  PreferenceLossArgs args(const PairBatch<Scalar>& batch, const PairOptions& options) const {
    return {batch.kDType,    batch.token_logps(), batch.token_strides, batch.targets(),
            options.average, options.pair_loss,   options.reduction,   sums.data(),
            loss.data(),     losses.data(),       logps.data(),        rewards.data(),
            sft_loss.data(), metrics.data(),      slopes.data(),       counts.data()};
  }

  const int64_t P;
  const Buffer<double> sums;
  const Buffer<Scalar> loss, losses, logps, rewards, sft_loss, slopes;
  const Buffer<double> metrics;
  const Buffer<int64_t> counts;
};

// Incoming gradients of the four outputs; bit i of missing: the i-th is null.
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

  PreferenceLossBackwardArgs args(const PairBatch<Scalar>& batch, const PairOptions& options,
                                  const PairOutputs<Scalar>& forward, Scalar* result) const {
    const auto unless_missing = [&](int i, const Buffer<Scalar>& buffer) {
      return (missing >> i & 1u) != 0 ? nullptr : buffer.data();
    };
    return {batch.kDType,
            batch.targets(),
            options.average,
            options.reduction,
            forward.slopes.data(),
            forward.counts.data(),
            unless_missing(0, loss),
            stride,
            unless_missing(1, losses),
            3,
            unless_missing(2, logps),
            1,
            unless_missing(3, sft_loss),
            stride,
            result};
  }

  // 0 where it is missing.
  double of_loss(int64_t p) const { return at(0, loss, p * stride); }
  double of_losses(int64_t p) const { return at(1, losses, 3 * p); }
  double of_logps(int64_t b) const { return at(2, logps, b); }
  double of_sft_loss(int64_t p) const { return at(3, sft_loss, p * stride); }

  const unsigned missing;
  const int64_t stride;
  const Buffer<Scalar> loss, losses, logps, sft_loss;

 private:
  double at(int i, const Buffer<Scalar>& buffer, int64_t index) const {
    return (missing >> i & 1u) != 0 ? 0.0 : static_cast<double>(buffer[index]);
  }
};

}  // namespace simpo_ext::kernel_tests
