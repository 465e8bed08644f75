// Log-probs and their gradient, computed directly in double, and the rounding errors that are
// allowed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/dtypes.h"
#include "core/loss_math.h"

namespace simpo_ext::kernel_tests {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename Scalar>
constexpr double kUnit = std::numeric_limits<Scalar>::epsilon() / 2;

// Half the distance between numbers of T around value.
template <typename T>
double half_ulp(double value) {
  // For T: the digits after the leading one, and the exponent of the least normal number.
  constexpr int kDigits = sizeof(T) == 8                ? 52
                          : sizeof(T) == 4              ? 23
                          : std::is_same_v<T, BFloat16> ? 7
                                                        : 10;
  constexpr int kLeast = sizeof(T) == 8 ? -1022 : std::is_same_v<T, Float16> ? -14 : -126;
  const int exponent = std::isfinite(value) && value != 0.0 ? std::ilogb(value) : kLeast;
  return std::ldexp(1.0, std::max(exponent, kLeast) - kDigits - 1);
}

template <typename Logit>
class RowTruth {
 public:
  using Scalar = Compute<Logit>;

  RowTruth(const Logit* x, int64_t V, int64_t label, LogitTransform transform)
      : label_(label), transform_(transform) {
    if (label < 0 || label >= V) return;
    z_.resize(static_cast<size_t>(V));
    bool has_nan = false;
    max_ = -kInfinity;
    for (int64_t v = 0; v < V; ++v) {
      const double scaled = static_cast<double>(widen(x[v])) * transform.logit_scale;
      const double z = transform.softcap == 0.0
                           ? scaled
                           : transform.softcap * std::tanh(scaled / transform.softcap);
      z_[static_cast<size_t>(v)] = z;
      has_nan = has_nan || std::isnan(z);
      max_ = std::max(max_, z);
    }
    is_nan_ = has_nan || std::isinf(max_);
    if (is_nan_) return;
    long double sum = 0.0;
    for (const double z : z_) sum += std::exp(z - max_);
    sum_exp_ = static_cast<double>(sum);
    for (int64_t v = 0; v < V; ++v) {
      const double p = probability(v);
      // The error of the sum: the weighted errors of its terms.
      if (p > 0.0) sum_error_ += p * term_error(v);
    }
    // And the errors of the additions: a few dozen in a thread, of one sign, and then pairwise.
    sum_error_ += 8 * kUnit<Scalar>;
  }

  // NaN or +inf among the z, all z -inf, or an invalid label.
  bool is_nan() const { return is_nan_; }
  double max() const { return max_; }
  double max_error() const { return z_error(max_); }
  double log_sum_exp() const { return std::log(sum_exp_); }
  double log_sum_exp_error() const {
    return sum_error_ + 2 * z_error(max_) + 3 * kUnit<double> * log_sum_exp();
  }

  double logp() const {
    if (is_nan_) return kNan;
    // In Scalar, which may have no number that small.
    return static_cast<double>(static_cast<Scalar>((z(label_) - max_) - std::log(sum_exp_)));
  }
  // The errors of the sum, of both z, and of rounding the result to Scalar.
  double logp_error() const {
    if (is_nan_ || std::isinf(logp())) return 0.0;
    return sum_error_ + z_error(z(label_)) + z_error(max_) + 3 * kUnit<Scalar> * std::fabs(logp());
  }

  double gradient(int64_t v, double grad) const {
    if (is_nan_) return kNan;
    return grad * ((v == label_) - probability(v)) * slope(v);
  }
  // Relative to the probability: one of 1e-9 is as exact as one of 0.5. The label's 1 - p is not
  // more exact than p.
  double gradient_error(int64_t v, double grad) const {
    if (is_nan_) return 0.0;
    const double p = probability(v);
    const double scale = std::fabs(grad * transform_.logit_scale);
    const double relative = p > 0.0 ? sum_error_ + term_error(v) + 6 * kUnit<Scalar> : 0.0;
    // 1 - (z / cap)^2 has the rounding error of z / cap twice, and none where it is 1.
    const double slope_error = transform_.softcap == 0.0 ? 0.0 : 24 * kUnit<Scalar>;
    const double weight = v == label_ ? 1.0 : p;
    const double expected = gradient(v, grad);
    return scale * weight * (relative + slope_error) + 6 * kUnit<Scalar> * std::fabs(expected) +
           // exp() may give 0 instead of a number below the least normal one.
           2 * scale * std::numeric_limits<Scalar>::min() + 1.01 * half_ulp<Logit>(expected) +
           half_ulp<Scalar>(0.0);
  }

 private:
  double z(int64_t v) const { return z_[static_cast<size_t>(v)]; }
  double probability(int64_t v) const { return std::exp(z(v) - max_) / sum_exp_; }

  double slope(int64_t v) const {
    if (transform_.softcap == 0.0) return transform_.logit_scale;
    const double ratio = z(v) / transform_.softcap;
    return transform_.logit_scale * (1.0 - ratio * ratio);
  }

  // Without a transform, a logit is exact. Scaling rounds the scale and the product. The cap rounds
  // two quotients, tanh and a product, none of which is larger than the cap.
  double z_error(double z) const {
    if (transform_.logit_scale == 1.0 && transform_.softcap == 0.0) return 0.0;
    if (transform_.softcap > 0.0) return 6 * kUnit<Scalar> * transform_.softcap;
    return 2 * kUnit<Scalar> * std::fabs(z);
  }

  // The relative error of exp(z - max): its own, and that of its argument, which is rounded twice.
  double term_error(int64_t v) const {
    return (4 + 3 * (max_ - z(v))) * kUnit<Scalar> + z_error(z(v)) + z_error(max_);
  }

  int64_t label_;
  LogitTransform transform_;
  std::vector<double> z_;
  double max_ = kNan, sum_exp_ = 0.0, sum_error_ = 0.0;
  bool is_nan_ = true;
};

}  // namespace simpo_ext::kernel_tests
