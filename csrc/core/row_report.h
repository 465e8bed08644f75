// The report of a row of logits: two more sums from the pass that computes its log-sum-exp.
#pragma once

#include <cmath>

#include "core/host_device.h"
#include "core/logsumexp.h"

namespace simpo_ext {

// Accompanies the LogSumExp of the same values z.
struct RowReport {
  double sum_z = 0.0;
  // sum(exp(z - max) (z - max)), with the max of the LogSumExp. A z of -inf adds 0.
  double sum_exp_z = 0.0;

  // Call before sum.raise_max(new_max).
  template <typename Scalar>
  SIMPO_HOST_DEVICE void raise_max(const LogSumExp<Scalar>& sum, Scalar new_max) {
    if (!(new_max > sum.max)) return;
    const double distance = static_cast<double>(sum.max) - static_cast<double>(new_max);
    const double scale = exp(distance);
    // The distance is infinite if the sum is empty.
    sum_exp_z = scale == 0.0 ? 0.0 : scale * (sum_exp_z + distance * sum.sum);
  }

  // Call before sum.merge(other_sum).
  template <typename Scalar>
  SIMPO_HOST_DEVICE void merge(const LogSumExp<Scalar>& sum, RowReport other,
                               const LogSumExp<Scalar>& other_sum) {
    raise_max(sum, other_sum.max);
    other.raise_max(other_sum, sum.max);
    sum_z += other.sum_z;
    sum_exp_z += other.sum_exp_z;
  }

  // The entropy of softmax(z) in nats, for a sum over all z. If one token has nearly all the
  // probability, rounding may put the result below 0, so it is clamped.
  SIMPO_HOST_DEVICE double entropy(double sum_exp) const {
    const double value = log(sum_exp) - sum_exp_z / sum_exp;
    return value < 0.0 ? 0.0 : value;
  }
};

}  // namespace simpo_ext
