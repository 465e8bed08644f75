// The preference loss and the logit transforms, each function with its derivative right below it.
// All devices and both front ends use these functions. No other file defines this math.
//
// Sources: SimPO (arXiv 2405.14734) eq. 6; label smoothing as in conservative DPO; hinge as in
// SLiC; IPO (arXiv 2310.12036) eq. 17; AlphaPO (arXiv 2501.03884).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace simpo_ext {

enum class LossType : int64_t { kSigmoid = 0, kHinge = 1, kIpo = 2 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class SftReduction : int64_t { kSequence = 0, kToken = 1 };
enum class EmptyPolicy : int64_t { kDrop = 0, kNan = 1 };

// ---- logit transform: x -> z = softcap * tanh(logit_scale * x / softcap), or logit_scale * x

struct LogitTransform {
  double logit_scale;
  double softcap;  // 0: no softcap
};

// The forms of the transform, at the precision of Scalar. Each has z(x), and below it dz/dx as a
// function of z: the product of common_slope(), which all logits share, and own_slope(z). Only the
// constructor divides. All forms increase with x, so the largest x has the largest z. A Value is a
// Scalar, or a vector of Scalars with the same operators, abs and tanh.

template <typename Scalar>
class ScaledLogits {
 public:
  using ScalarType = Scalar;
  static constexpr bool kIsCapped = false;

  SIMPO_HOST_DEVICE explicit ScaledLogits(LogitTransform transform)
      : scale_(static_cast<Scalar>(transform.logit_scale)) {}

  template <typename Value>
  SIMPO_HOST_DEVICE Value z(Value x) const {
    return x * Value(scale_);
  }
  SIMPO_HOST_DEVICE Scalar common_slope() const { return scale_; }
  template <typename Value>
  SIMPO_HOST_DEVICE Value own_slope(Value /*z*/) const {
    return Value(Scalar(1));
  }

 private:
  Scalar scale_;
};

// ScaledLogits with a logit_scale of 1, for loops in which a multiplication counts.
template <typename Scalar>
class PlainLogits {
 public:
  using ScalarType = Scalar;
  static constexpr bool kIsCapped = false;

  SIMPO_HOST_DEVICE explicit PlainLogits(LogitTransform /*transform*/) {}

  template <typename Value>
  SIMPO_HOST_DEVICE Value z(Value x) const {
    return x;
  }
  SIMPO_HOST_DEVICE Scalar common_slope() const { return Scalar(1); }
  template <typename Value>
  SIMPO_HOST_DEVICE Value own_slope(Value /*z*/) const {
    return Value(Scalar(1));
  }
};

template <typename Scalar>
class CappedLogits {
 public:
  using ScalarType = Scalar;
  static constexpr bool kIsCapped = true;

  SIMPO_HOST_DEVICE explicit CappedLogits(LogitTransform transform)
      : scale_(static_cast<Scalar>(transform.logit_scale)),
        cap_(static_cast<Scalar>(transform.softcap)),
        inverse_cap_(static_cast<Scalar>(1.0 / transform.softcap)) {
    // A logit of 0 times an infinite factor would be NaN.
    const double ratio = transform.logit_scale / transform.softcap;
    const double largest = static_cast<double>(std::numeric_limits<Scalar>::max());
    scale_over_cap_ = static_cast<Scalar>(ratio < largest ? ratio : largest);
  }

  template <typename Value>
  SIMPO_HOST_DEVICE Value z(Value x) const {
    using std::tanh;
    return Value(cap_) * tanh(x * Value(scale_over_cap_));
  }
  SIMPO_HOST_DEVICE Scalar common_slope() const { return scale_; }

  // 1 - r^2 with r = z / cap. It is computed as (1 - |r|)(1 + |r|), because 1 - r * r loses digits
  // where |z| is close to the cap. 1 - |r| is computed as (cap - |z|) / cap, which is exactly 0 if
  // |z| is the cap.
  template <typename Value>
  SIMPO_HOST_DEVICE Value own_slope(Value z) const {
    using std::abs;
    const Value one(Scalar(1)), inverse_cap(inverse_cap_), magnitude = abs(z);
    return ((Value(cap_) - magnitude) * inverse_cap) * (one + magnitude * inverse_cap);
  }

 private:
  Scalar scale_, cap_, inverse_cap_, scale_over_cap_;
};

// ---- sequence log-probability ---------------------------------------------------------------

// sum: the sum of the log-probs of count valid tokens. For an empty sequence the result is NaN, not
// 0, which would be the best possible reward.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar sequence_logp(Scalar sum, int64_t count, bool average) {
  if (count == 0) return std::numeric_limits<Scalar>::quiet_NaN();
  return average ? sum / static_cast<Scalar>(count) : sum;
}

// d sequence_logp / d (log-prob of one valid token).
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar sequence_logp_slope(int64_t count, bool average) {
  return average ? Scalar(1) / static_cast<Scalar>(count) : Scalar(1);
}

// ---- pair loss ------------------------------------------------------------------------------

struct PairLoss {
  LossType type;
  double beta;
  double gamma_beta_ratio;
  double label_smoothing;  // probability that chosen and rejected are swapped; sigmoid only
  double alpha;            // AlphaPO's; 0: none
};

// The reward of a log-prob l before beta: l, or (1 - exp(l)^-alpha) / alpha with an alpha. expm1
// keeps the digits that 1 - exp loses where alpha l is small.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar shaped_logp(Scalar logp, const PairLoss& loss) {
  const Scalar alpha = static_cast<Scalar>(loss.alpha);
  return alpha == Scalar(0) ? logp : -std::expm1(-alpha * logp) / alpha;
}

// d shaped_logp / d logp.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar shaped_logp_slope(Scalar logp, const PairLoss& loss) {
  const Scalar alpha = static_cast<Scalar>(loss.alpha);
  return alpha == Scalar(0) ? Scalar(1) : std::exp(-alpha * logp);
}

// log(1 + exp(y)) = -logsigmoid(-y).
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar softplus(Scalar y) {
  return (y > Scalar(0) ? y : Scalar(0)) + std::log1p(std::exp(-std::fabs(y)));
}

// d softplus / dy.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar sigmoid(Scalar y) {
  const Scalar e = std::exp(-std::fabs(y));
  return (y >= Scalar(0) ? Scalar(1) : e) / (Scalar(1) + e);
}

// beta * z, with z = (chosen - rejected) - gamma_beta_ratio. chosen and rejected are shaped
// log-probs.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar scaled_margin(Scalar chosen, Scalar rejected,
                                              const PairLoss& loss) {
  return static_cast<Scalar>(loss.beta) *
         ((chosen - rejected) - static_cast<Scalar>(loss.gamma_beta_ratio));
}

// The distance of z from IPO's target: z - 1 / (2 beta).
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar ipo_excess(Scalar margin, const PairLoss& loss) {
  return (margin - Scalar(0.5)) / static_cast<Scalar>(loss.beta);
}

// sigmoid: -logsigmoid(m) (1 - eps) - logsigmoid(-m) eps; hinge: relu(1 - m); IPO: (z - 1 / (2
// beta))^2; m = scaled_margin.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar pair_loss(Scalar margin, const PairLoss& loss) {
  if (loss.type == LossType::kIpo) {
    const Scalar excess = ipo_excess(margin, loss);
    return excess * excess;
  }
  if (loss.type == LossType::kHinge) {
    const Scalar slack = Scalar(1) - margin;
    return slack <= Scalar(0) ? Scalar(0) : slack;  // NaN is not <= 0, so it stays NaN
  }
  const Scalar eps = static_cast<Scalar>(loss.label_smoothing);
  if (eps == Scalar(0)) return softplus(-margin);  // 0 * softplus(inf) would be NaN
  return (Scalar(1) - eps) * softplus(-margin) + eps * softplus(margin);
}

// d pair_loss / d (shaped chosen log-prob). For rejected, it is the negative. 0 at the hinge's
// kink.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar pair_loss_slope(Scalar margin, const PairLoss& loss) {
  const Scalar beta = static_cast<Scalar>(loss.beta);
  if (loss.type == LossType::kIpo) return Scalar(2) * ipo_excess(margin, loss);
  if (loss.type == LossType::kHinge) {
    if (margin != margin) return margin;
    return margin < Scalar(1) ? -beta : Scalar(0);
  }
  const Scalar eps = static_cast<Scalar>(loss.label_smoothing);
  return beta * (eps * sigmoid(margin) - (Scalar(1) - eps) * sigmoid(-margin));
}

// ---- reduction over pairs and tokens --------------------------------------------------------

struct LossReduction {
  Reduction reduction;
  SftReduction sft_reduction;
  EmptyPolicy empty;
  double sft_weight;
};

SIMPO_HOST_DEVICE inline bool is_pair_counted(int64_t chosen_count, int64_t rejected_count,
                                              EmptyPolicy empty) {
  return empty == EmptyPolicy::kNan || (chosen_count > 0 && rejected_count > 0);
}

// total, or total / denominator for a mean. The mean over zero terms is 0 if empty pairs are
// dropped, and otherwise NaN.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar reduce_total(Scalar total, int64_t denominator,
                                             const LossReduction& reduction) {
  if (reduction.reduction != Reduction::kMean) return total;
  if (denominator == 0 && reduction.empty == EmptyPolicy::kDrop) return Scalar(0);
  return total / static_cast<Scalar>(denominator);
}

// d reduce_total / d (one term of total).
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar reduce_total_slope(int64_t denominator,
                                                   const LossReduction& reduction) {
  if (reduction.reduction != Reduction::kMean) return Scalar(1);
  return Scalar(1) / static_cast<Scalar>(denominator);
}

}  // namespace simpo_ext
