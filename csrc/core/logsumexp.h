// The online log-sum-exp: a maximum and a sum, which need every logit once and can be merged.
#pragma once

#include <cmath>
#include <limits>

#include "core/host_device.h"

namespace simpo_ext {

// Holds sum(exp(z)) of the values so far as sum * exp(max). Without values it is (-inf, 0).
// log_probability() is NaN if there is a NaN or +inf among the values, or if all are -inf.
template <typename Scalar>
struct LogSumExp {
  Scalar max = -std::numeric_limits<Scalar>::infinity();
  double sum = 0.0;

  // The number to subtract before exp: max, or 0 while max is -inf, because -inf - -inf is NaN.
  SIMPO_HOST_DEVICE Scalar reference() const {
    return max == -std::numeric_limits<Scalar>::infinity() ? Scalar(0) : max;
  }

  // Rescales the sum for values up to new_max. Call before adding their terms exp(z - reference()).
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
    if (other.sum == 0.0) return;  // both max may be -inf, whose difference is NaN
    sum += other.sum * exp(static_cast<double>(other.max) - static_cast<double>(max));
  }

  // The log-probability of z: z - log(sum(exp)). max is subtracted first, which is exact for values
  // of similar size. So a common offset of all values costs no accuracy.
  SIMPO_HOST_DEVICE double log_probability(Scalar z) const {
    return (static_cast<double>(z) - static_cast<double>(max)) - log(sum);
  }
};

// A row of a sharded vocabulary. The shards are added in order, so that every rank gets the same
// bits.
template <typename Scalar>
struct ShardedRow {
  LogSumExp<Scalar> logsumexp;
  Scalar label_z = std::numeric_limits<Scalar>::quiet_NaN();
  bool has_two_labels = false;

  // z: that of the label, or NaN if the label is on another shard.
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

// 1 - exp(logp), for a log-probability that rounding may have put above 0. expm1, because 1 - exp
// cancels where the probability is close to 1.
SIMPO_HOST_DEVICE inline double one_minus_exp(double logp) {
  return -std::expm1(logp > 0.0 ? 0.0 : logp);
}

}  // namespace simpo_ext
