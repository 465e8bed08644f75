// Neumaier's compensated sum: as accurate as a sum in twice the precision.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace simpo_ext {

template <typename Scalar>
class CompensatedSum {
 public:
  SIMPO_HOST_DEVICE void add(Scalar value) {
    const Scalar next = sum_ + value;
    const bool sum_is_larger = std::fabs(sum_) >= std::fabs(value);
    lost_ += sum_is_larger ? (sum_ - next) + value : (value - next) + sum_;
    sum_ = next;
  }

  // Adds the other's values.
  SIMPO_HOST_DEVICE void merge(const CompensatedSum& other) {
    add(other.sum_);
    lost_ += other.lost_;
  }

  SIMPO_HOST_DEVICE Scalar value() const {
    // If the sum is infinite, the correction is NaN, from inf - inf.
    return std::isfinite(sum_) ? sum_ + lost_ : sum_;
  }

 private:
  Scalar sum_ = 0;
  Scalar lost_ = 0;
};

}  // namespace simpo_ext
