// The arithmetic of the logit transforms (core/loss_math.h) on the GPU.
#pragma once

#include <cmath>

#include "core/dtypes.h"
#include "cuda/platform.h"

namespace simpo_ext::cuda {

// A number whose products are rounded. The compiler would fuse a plain product with the following
// sum. Then z = logit_scale * x would be unrounded in z - max but rounded where the label's z is
// stored, and a label with probability 1 would not have a log-probability of 0.
template <typename Scalar>
struct Rounded {
  Scalar value;

  Rounded() = default;
  SIMPO_DEVICE explicit Rounded(Scalar number) : value(number) {}

  SIMPO_DEVICE friend Rounded operator*(Rounded a, Rounded b) {
    return Rounded(multiply_rounded(a.value, b.value));
  }
  SIMPO_DEVICE friend Rounded operator+(Rounded a, Rounded b) { return Rounded(a.value + b.value); }
  SIMPO_DEVICE friend Rounded operator-(Rounded a, Rounded b) { return Rounded(a.value - b.value); }
  SIMPO_DEVICE friend Rounded abs(Rounded a) { return Rounded(std::fabs(a.value)); }
};

// tanh of a float within 3 ulp, with two special functions and no branch. Both forms are computed:
// near 0, where 1 - 2 / (exp(2u) + 1) would cancel, a polynomial takes its place.
SIMPO_DEVICE float fast_tanh(float u) {
  constexpr float kPolynomialBelow = 0.55f;
  // (tanh(u) - u) / u^3 in powers of u^2. A minimax polynomial for the relative error of tanh,
  // which is 4e-8.
  constexpr float kCoefficients[4] = {-0.33332947f, 0.13320725f, -0.0526718f, 0.01643756f};
  const float u2 = u * u;
  float polynomial = kCoefficients[3];
  SIMPO_UNROLL
  for (int i = 2; i >= 0; --i) polynomial = std::fma(polynomial, u2, kCoefficients[i]);
  const float near_zero = std::fma(polynomial * u2, u, u);

  const float exp_2u = exp2_approx(std::fabs(u) * 2.88539008f);
  const float elsewhere = std::fma(-2.0f, reciprocal_approx(exp_2u + 1.0f), 1.0f);
  return std::fabs(u) < kPolynomialBelow ? near_zero : std::copysign(elsewhere, u);
}

SIMPO_DEVICE Rounded<float> tanh(Rounded<float> u) { return Rounded<float>(fast_tanh(u.value)); }
SIMPO_DEVICE Rounded<double> tanh(Rounded<double> u) { return Rounded<double>(std::tanh(u.value)); }

// The z of a logit x, like Logits::z.
template <class Logits, typename Scalar>
SIMPO_DEVICE Scalar transformed(const Logits& logits, Scalar x) {
  return logits.z(Rounded<Scalar>(x)).value;
}

// Like Logits::own_slope.
template <class Logits, typename Scalar>
SIMPO_DEVICE Scalar own_slope(const Logits& logits, Scalar z) {
  return logits.own_slope(Rounded<Scalar>(z)).value;
}

}  // namespace simpo_ext::cuda
