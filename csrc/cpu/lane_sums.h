// Sums over the lanes of vectors, at the precision that a pass over a row needs. Included like
// vector_math.h, after one of the simd_*.h.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/compensated_sum.h"
#include "core/row_report.h"
#include "cpu/vector_math.h"

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

// The number of terms that a lane adds up in its own precision before the sum moves to double. If
// one term outweighs all others, only the terms in its lane lose their last digits.
constexpr int64_t kTermsPerLane = 32;

// Sums of lanes. Sums of floats are moved to double from time to time. Sums of doubles are
// compensated.
template <typename Scalar>
class LaneSums;

template <>
class LaneSums<float> {
 public:
  void add(Vec<float> x) { sum_ = sum_ + x; }
  void add_product(Vec<float> x, Vec<float> y) { sum_ = fma(x, y, sum_); }
  // Moves the sums to double. Call after every kTermsPerLane terms.
  void empty() {
    add_widened(sum_, low_, high_);
    sum_ = Vec<float>(0.0f);
  }
  // Call empty() on all sums first.
  template <int kVectors>
  static double total(const LaneSums (&sums)[kVectors]) {
    Vec<double> total = sums[0].low_ + sums[0].high_;
    for (int k = 1; k < kVectors; ++k) total = total + (sums[k].low_ + sums[k].high_);
    return sum_of_lanes(total);
  }

 private:
  Vec<float> sum_{0.0f};
  Vec<double> low_{0.0}, high_{0.0};
};

template <>
class LaneSums<double> {
 public:
  void add(Vec<double> x) {
    const Vec<double> sum = sum_ + x, added = sum - sum_;
    lost_ = lost_ + ((sum_ - (sum - added)) + (x - added));
    sum_ = sum;
  }
  void add_product(Vec<double> x, Vec<double> y) { add(x * y); }
  void empty() {}
  template <int kVectors>
  static double total(const LaneSums (&sums)[kVectors]) {
    CompensatedSum<double> total;
    for (const LaneSums& lanes : sums) {
      for (const Vec<double>& vector : {lanes.sum_, lanes.lost_}) {
        double values[Vec<double>::kSize];
        __builtin_memcpy(values, &vector, sizeof(values));
        for (const double value : values) total.add(value);
      }
    }
    return total.value();
  }

 private:
  Vec<double> sum_{0.0}, lost_{0.0};
};

// LaneSums<double> for terms that may be -inf. With compensation, their sum would be NaN.
class DoubleLaneSums {
 public:
  void add(Vec<double> x) { sum_ = sum_ + x; }
  void empty() {}
  template <int kVectors>
  static double total(const DoubleLaneSums (&sums)[kVectors]) {
    Vec<double> total = sums[0].sum_;
    for (int k = 1; k < kVectors; ++k) total = total + sums[k].sum_;
    return sum_of_lanes(total);
  }

 private:
  Vec<double> sum_{0.0};
};
template <typename Scalar>
using PlainLaneSums =
    std::conditional_t<std::is_same_v<Scalar, double>, DoubleLaneSums, LaneSums<float>>;

// The sums of a block's RowReport, from distances z - reference.
template <typename Scalar>
class BlockReport {
 public:
  static constexpr int kVectors = 2 * kPairsPerStep;

  // For a distance of -inf, exp is 0, and 0 times a finite distance stays 0.
  static Vec<Scalar> finite(Vec<Scalar> distance) {
    return larger(Vec<Scalar>(std::numeric_limits<Scalar>::lowest()), distance);
  }

  void add(const Vec<Scalar> (&exps)[kVectors], const Vec<Scalar> (&distances)[kVectors]) {
    SIMPO_EACH distances_[k].add(distances[k]);
    SIMPO_EACH products_[k].add_product(exps[k], finite(distances[k]));
  }
  // Unused lanes are 0.
  void add(Vec<Scalar> exps, Vec<Scalar> distances) {
    distances_[0].add(distances);
    products_[0].add_product(exps, finite(distances));
  }
  void empty() {
    SIMPO_EACH distances_[k].empty();
    SIMPO_EACH products_[k].empty();
  }
  // The report of n logits. Call empty() first.
  RowReport report(int64_t n, Scalar reference) const {
    const double references = static_cast<double>(n) * static_cast<double>(reference);
    return {references + PlainLaneSums<Scalar>::total(distances_),
            LaneSums<Scalar>::total(products_)};
  }

 private:
  PlainLaneSums<Scalar> distances_[kVectors];
  LaneSums<Scalar> products_[kVectors];
};

}  // namespace
}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
