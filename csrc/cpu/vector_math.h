// exp and tanh on vectors, for every instruction set and both precisions. A file that defines
// SIMPO_ISA includes one of the simd_*.h and then this file.
#pragma once

#include <cstdint>

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

// exp(r) = 1 + r + r^2 q(r) for |r| <= ln2 / 2. These are the coefficients of q, lowest power
// first.
template <typename Scalar>
struct ExpCoefficients;

// A minimax polynomial for the relative error, which is 3e-9.
template <>
struct ExpCoefficients<float> {
  static constexpr int kCount = 5;
  static constexpr float kQ[kCount] = {4.999999403953552e-1f, 1.666652113199234e-1f,
                                       4.166838899254799e-2f, 8.368716575205326e-3f,
                                       1.381459878757596e-3f};
};

// An interpolation at Chebyshev nodes, with a relative error of 2e-17.
template <>
struct ExpCoefficients<double> {
  static constexpr int kCount = 10;
  static constexpr double kQ[kCount] = {
      0.5000000000000001,     0.16666666666666669,    0.04166666666662399,   0.008333333333330051,
      0.0013888888917281794,  0.00019841269863105968, 2.480152119021773e-05, 2.7557268378684192e-06,
      2.7620138719733994e-07, 2.5100424157005067e-08};
};

template <typename Scalar>
inline constexpr Scalar kLog2e = static_cast<Scalar>(1.4426950408889634);

// Functions of several vectors do each step for all of them before the next step. If one vector's
// chain of steps followed another's, a processor's schedulers would be too small to overlap them.
#define SIMPO_EACH _Pragma("GCC unroll 8") for (int k = 0; k < kVectors; ++k)

// x = n ln2 + r with |r| <= ln2 / 2 and n an integer.
template <typename Scalar, int kVectors>
struct ReducedExponents {
  Vec<Scalar> n[kVectors], r[kVectors];

  explicit ReducedExponents(const Vec<Scalar> (&x)[kVectors]) {
    SIMPO_EACH n[k] = x[k] * Vec<Scalar>(kLog2e<Scalar>);
    SIMPO_EACH n[k] = round(n[k]);
    SIMPO_EACH r[k] = minus_multiple_of_ln2(x[k], n[k]);
  }
};

// factor * exp(x) for x <= 0. The factor is part of the polynomial, where it costs nothing. The
// result is exactly 0 for -inf, exactly factor for 0, and NaN for NaN. For x > 0 it is correct if
// exp(x) is finite, and arbitrary otherwise.
template <typename Scalar>
class ScaledExp;

// Computed as 2^floor(t) 2^f with t = x log2(e). The rounding of t leaves a relative error below
// 2.1e-7 + 8e-8 |x|. In a sum of exp, terms with a large |x| are small, and so are their errors.
template <>
class ScaledExp<float> {
 public:
  explicit ScaledExp(float factor) {
    for (int i = 0; i < kCount; ++i) coefficients_[i] = Vec<float>(factor * kPowerOfTwo[i]);
  }

  // x[k] = factor * exp(x[k])
  template <int kVectors>
  void apply(Vec<float> (&x)[kVectors]) const {
    Vec<float> f[kVectors];
    Power power[kVectors];
    SIMPO_EACH x[k] = x[k] * Vec<float>(kLog2e<float>);
    SIMPO_EACH power[k] = split_exponent(x[k], f[k]);
    SIMPO_EACH x[k] = fma(coefficients_[kCount - 1], f[k], coefficients_[kCount - 2]);
    _Pragma("GCC unroll 8") for (int i = kCount - 3; i >= 0; --i) {
      SIMPO_EACH x[k] = fma(x[k], f[k], coefficients_[i]);
    }
    SIMPO_EACH x[k] = times(x[k], power[k]);
  }

 private:
  // 2^f on [0, 1], exact at 0. A minimax polynomial for the relative error, which is 8e-8.
  static constexpr int kCount = 6;
  static constexpr float kPowerOfTwo[kCount] = {1.0f,
                                                0.6931512951850891f,
                                                0.24016444385051727f,
                                                0.05579991266131401f,
                                                0.009017030708491802f,
                                                0.0018671299330890179f};
  Vec<float> coefficients_[kCount];
};

// Relative error below 3e-16.
template <>
class ScaledExp<double> {
 public:
  explicit ScaledExp(double factor) : factor_(factor) {
    for (int i = 0; i < kCount; ++i) q_[i] = Vec<double>(factor * ExpCoefficients<double>::kQ[i]);
  }

  // x[k] = factor * exp(x[k])
  template <int kVectors>
  void apply(Vec<double> (&x)[kVectors]) const {
    SIMPO_EACH x[k] = larger(Vec<double>(Vec<double>::kExpIsZero), x[k]);
    const ReducedExponents<double, kVectors> reduced(x);
    SIMPO_EACH x[k] = fma(q_[kCount - 1], reduced.r[k], q_[kCount - 2]);
    _Pragma("GCC unroll 16") for (int i = kCount - 3; i >= 0; --i) {
      SIMPO_EACH x[k] = fma(x[k], reduced.r[k], q_[i]);
    }
    SIMPO_EACH x[k] = fma(x[k], reduced.r[k], factor_);
    SIMPO_EACH x[k] = fma(x[k], reduced.r[k], factor_);
    SIMPO_EACH x[k] = times_two_to(x[k], reduced.n[k]);
  }

 private:
  static constexpr int kCount = ExpCoefficients<double>::kCount;
  Vec<double> q_[kCount];
  Vec<double> factor_;
};

// Computed as e / (e + 2) with e = exp(2 |y|) - 1, which is also accurate for small |y|.
template <typename Scalar>
inline Vec<Scalar> tanh(Vec<Scalar> y) {
  using V = Vec<Scalar>;
  // Above this, tanh rounds to 1.
  const V largest(sizeof(Scalar) == 4 ? Scalar(20) : Scalar(40));
  const V magnitude = abs(y);
  const V twice[1] = {smaller(largest, magnitude + magnitude)};
  const ReducedExponents<Scalar, 1> reduced(twice);
  const V r = reduced.r[0];
  constexpr int kCount = ExpCoefficients<Scalar>::kCount;
  V q(ExpCoefficients<Scalar>::kQ[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) q = fma(q, r, V(ExpCoefficients<Scalar>::kQ[i]));
  const V expm1_r = fma(q * r, r, r);
  const V power = times_two_to(V(Scalar(1)), reduced.n[0]);
  const V expm1 = fma(power, expm1_r, power - V(Scalar(1)));
  return with_sign_of(expm1 / (expm1 + V(Scalar(2))), y);
}

}  // namespace
}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
