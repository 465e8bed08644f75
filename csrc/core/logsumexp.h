// The online log-sum-exp: a (max, sum) monoid that sees every logit once.
#pragma once

#include <cmath>
#include <limits>

#include "core/host_device.h"

namespace simpo_ext {

// Holds sum(exp(z)) of the values seen so far as sum * exp(max). Empty is (-inf, 0).
// A NaN or +inf among the values makes every log_probability() NaN, as do values that are all -inf.
template <typename Scalar>
struct LogSumExp {
  Scalar max = -std::numeric_limits<Scalar>::infinity();
  double sum = 0.0;

  // What to subtract before exp: max, but finite when nothing above -inf has been seen, because
  // -inf - -inf is NaN.
  SIMPO_HOST_DEVICE Scalar reference() const {
    return max == -std::numeric_limits<Scalar>::infinity() ? Scalar(0) : max;
  }

  // Makes room for values up to new_max; call before adding terms exp(z - reference()).
  SIMPO_HOST_DEVICE void raise_max(Scalar new_max) {
    if (new_max > max) {
      sum *= exp(static_cast<double>(max) - static_cast<double>(new_max));
      max = new_max;
    }
  }

  SIMPO_HOST_DEVICE void add_terms(double terms) { sum += terms; }

  SIMPO_HOST_DEVICE void merge(const LogSumExp& other) {
    if (sum == 0.0 && max == -std::numeric_limits<Scalar>::infinity()) {  // empty
      *this = other;
      return;
    }
    raise_max(other.max);
    if (other.sum == 0.0) return;  // whose max may be -inf, as this one's
    sum += other.sum * exp(static_cast<double>(other.max) - static_cast<double>(max));
  }

  // z - log(sum(exp)): the log-probability of z. Subtracting max first is exact where it matters,
  // so that an offset common to all values costs nothing.
  SIMPO_HOST_DEVICE double log_probability(Scalar z) const {
    return (static_cast<double>(z) - static_cast<double>(max)) - log(sum);
  }
};

// A row of a vocabulary in shards, which are added in order: so every rank comes to the same bits.
template <typename Scalar>
struct ShardedRow {
  LogSumExp<Scalar> logsumexp;
  Scalar label_z = std::numeric_limits<Scalar>::quiet_NaN();
  bool has_two_labels = false;

  // z: the label's, NaN where it is on another shard.
  SIMPO_HOST_DEVICE void add(double max, double sum, double z) {
    logsumexp.merge({static_cast<Scalar>(max), sum});
    if (z != z) return;
    has_two_labels = has_two_labels || label_z == label_z;
    label_z = static_cast<Scalar>(z);
  }

  SIMPO_HOST_DEVICE double logp() const {
    return has_two_labels ? std::numeric_limits<double>::quiet_NaN()
                          : logsumexp.log_probability(label_z);
  }
};

// 1 - exp(logp), for a log-probability that rounding may have put above 0. expm1, since 1 - exp
// would cancel where the model is sure.
SIMPO_HOST_DEVICE inline double one_minus_exp(double logp) {
  return -std::expm1(logp > 0.0 ? 0.0 : logp);
}

}  // namespace simpo_ext
