// What is reported of a row of logits beside its log-sum-exp: two more sums of the same pass.
#pragma once

#include <cmath>

#include "core/host_device.h"
#include "core/logsumexp.h"

namespace simpo_ext {

// Beside the LogSumExp of the same values z.
struct RowReport {
  double sum_z = 0.0;
  // sum(exp(z - max) (z - max)), with the max of the LogSumExp. A z of -inf adds 0.
  double sum_exp_z = 0.0;

  // For a sum whose max is about to be raised.
  template <typename Scalar>
  SIMPO_HOST_DEVICE void raise_max(const LogSumExp<Scalar>& sum, Scalar new_max) {
    if (!(new_max > sum.max)) return;
    const double distance = static_cast<double>(sum.max) - static_cast<double>(new_max);
    const double scale = exp(distance);
    // Of an empty sum the distance is infinite.
    sum_exp_z = scale == 0.0 ? 0.0 : scale * (sum_exp_z + distance * sum.sum);
  }

  // For a sum into which other_sum is about to be merged.
  template <typename Scalar>
  SIMPO_HOST_DEVICE void merge(const LogSumExp<Scalar>& sum, RowReport other,
                               const LogSumExp<Scalar>& other_sum) {
    raise_max(sum, other_sum.max);
    other.raise_max(other_sum, sum.max);
    sum_z += other.sum_z;
    sum_exp_z += other.sum_exp_z;
  }

  // In nats, of softmax(z) with all z in the sum. What rounding leaves of that of a sure row may be
  // below 0, which no entropy is.
  SIMPO_HOST_DEVICE double entropy(double sum_exp) const {
    const double value = log(sum_exp) - sum_exp_z / sum_exp;
    return value < 0.0 ? 0.0 : value;
  }
};

}  // namespace simpo_ext
