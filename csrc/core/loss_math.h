// The preference loss and the logit transforms: each function with its derivative right below it.
// Shared by every device and both front ends; nothing else in the project defines this math.
//
// Sources: SimPO (arXiv 2405.14734) eq. 6; label smoothing as in conservative DPO; hinge as in
// SLiC.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace simpo_ext {

enum class LossType : int64_t { kSigmoid = 0, kHinge = 1 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum class SftReduction : int64_t { kSequence = 0, kToken = 1 };
enum class EmptyPolicy : int64_t { kDrop = 0, kNan = 1 };

// ---- logit transform: x -> z = softcap * tanh(logit_scale * x / softcap), or logit_scale * x

struct LogitTransform {
  double logit_scale;
  double softcap;  // 0: no softcap

  SIMPO_HOST_DEVICE bool is_identity() const { return logit_scale == 1.0 && softcap == 0.0; }
};

template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar transform_logit(Scalar x, LogitTransform transform) {
  const Scalar scaled = x * static_cast<Scalar>(transform.logit_scale);
  if (transform.softcap == 0.0) return scaled;
  const Scalar cap = static_cast<Scalar>(transform.softcap);
  return cap * std::tanh(scaled / cap);
}

// dz/dx, from z itself: logit_scale * (1 - (z / softcap)^2).
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar transform_logit_slope(Scalar z, LogitTransform transform) {
  const Scalar scale = static_cast<Scalar>(transform.logit_scale);
  if (transform.softcap == 0.0) return scale;
  const Scalar ratio = z / static_cast<Scalar>(transform.softcap);
  // (1 - r)(1 + r) keeps the digits that 1 - r * r loses where the cap saturates.
  return scale * ((Scalar(1) - ratio) * (Scalar(1) + ratio));
}

// ---- sequence log-probability ---------------------------------------------------------------

// sum: the log-probs of the count valid tokens, added up. An empty sequence has none: NaN, never 0,
// which would be the best reward there is.
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
};

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

// beta * z, with z = (chosen - rejected) - gamma_beta_ratio.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar scaled_margin(Scalar chosen_logp, Scalar rejected_logp,
                                              const PairLoss& loss) {
  return static_cast<Scalar>(loss.beta) *
         ((chosen_logp - rejected_logp) - static_cast<Scalar>(loss.gamma_beta_ratio));
}

// sigmoid: -logsigmoid(m) (1 - eps) - logsigmoid(-m) eps; hinge: relu(1 - m); m = scaled_margin.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar pair_loss(Scalar margin, const PairLoss& loss) {
  if (loss.type == LossType::kHinge) {
    const Scalar slack = Scalar(1) - margin;
    return slack <= Scalar(0) ? Scalar(0) : slack;  // NaN is not <= 0, and stays
  }
  const Scalar eps = static_cast<Scalar>(loss.label_smoothing);
  if (eps == Scalar(0)) return softplus(-margin);  // 0 * softplus(inf) would be NaN
  return (Scalar(1) - eps) * softplus(-margin) + eps * softplus(margin);
}

// d pair_loss / d chosen_logp; that of rejected_logp is its negative. At the hinge's kink: 0.
template <typename Scalar>
SIMPO_HOST_DEVICE inline Scalar pair_loss_slope(Scalar margin, const PairLoss& loss) {
  const Scalar beta = static_cast<Scalar>(loss.beta);
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

// total / denominator; a mean over nothing is 0 where empties are dropped and NaN where they are
// not.
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
