// The elements of a 16-byte vector of logits, per dtype, and exp at the precision of each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtypes.h"
#include "cuda/platform.h"

namespace simpo_ext::cuda {

// exp(x) to about 2e-7 + |x| 6e-8 relative: x log2(e) is rounded before its power is taken. Results
// below float's normal range are 0.
SIMPO_DEVICE float fast_exp(float x) { return exp2_approx(x * 1.44269504f); }
SIMPO_DEVICE double fast_exp(double x) { return std::exp(x); }

// Of a number and a NaN, the number.
template <typename Scalar>
SIMPO_DEVICE Scalar larger(Scalar a, Scalar b) {
  return std::fmax(a, b);
}

// get(v, k): element k. pack(values): the vector of narrowed values. larger(a, b): element by
// element. largest(v): of all elements. kMinusInfinity: two, four or eight times -inf, as words.
template <typename T>
struct Elements;

template <>
struct Elements<float> {
  static constexpr int kWidth = 4;
  static constexpr uint32_t kMinusInfinity[2] = {0xff800000u, 0xff800000u};

  SIMPO_DEVICE static float get(const Vector16& v, int k) { return float_from_bits(v.words[k]); }
  SIMPO_DEVICE static Vector16 pack(const float* values) {
    return {{float_bits(values[0]), float_bits(values[1]), float_bits(values[2]),
             float_bits(values[3])}};
  }
  SIMPO_DEVICE static float widen(float value) { return value; }
  SIMPO_DEVICE static float narrow(float value) { return value; }
  SIMPO_DEVICE static Vector16 larger(const Vector16& a, const Vector16& b) {
    Vector16 result;
    SIMPO_UNROLL
    for (int k = 0; k < 4; ++k) result.words[k] = float_bits(cuda::larger(get(a, k), get(b, k)));
    return result;
  }
  SIMPO_DEVICE static float largest(const Vector16& v) {
    return cuda::larger(cuda::larger(get(v, 0), get(v, 1)), cuda::larger(get(v, 2), get(v, 3)));
  }
};

template <>
struct Elements<double> {
  static constexpr int kWidth = 2;
  static constexpr uint32_t kMinusInfinity[2] = {0u, 0xfff00000u};

  SIMPO_DEVICE static double get(const Vector16& v, int k) {
    double value;
    std::memcpy(&value, &v.words[2 * k], sizeof(value));
    return value;
  }
  SIMPO_DEVICE static Vector16 pack(const double* values) {
    Vector16 result;
    std::memcpy(result.words, values, sizeof(result));
    return result;
  }
  SIMPO_DEVICE static double widen(double value) { return value; }
  SIMPO_DEVICE static double narrow(double value) { return value; }
  SIMPO_DEVICE static Vector16 larger(const Vector16& a, const Vector16& b) {
    const double values[2] = {cuda::larger(get(a, 0), get(b, 0)),
                              cuda::larger(get(a, 1), get(b, 1))};
    return pack(values);
  }
  SIMPO_DEVICE static double largest(const Vector16& v) {
    return cuda::larger(get(v, 0), get(v, 1));
  }
};

// Two elements a word, the first in the low half.
template <>
struct Elements<BFloat16> {
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInfinity[2] = {0xff80ff80u, 0xff80ff80u};

  SIMPO_DEVICE static float get(const Vector16& v, int k) {
    const uint32_t word = v.words[k / 2];
    return float_from_bits(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
  SIMPO_DEVICE static Vector16 pack(const float* values) {
    Vector16 result;
    SIMPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      result.words[i] = narrow_bfloat16x2(values[2 * i], values[2 * i + 1]);
    }
    return result;
  }
  SIMPO_DEVICE static float widen(BFloat16 value) { return simpo_ext::widen(value); }
  SIMPO_DEVICE static BFloat16 narrow(float value) {
    return {static_cast<uint16_t>(narrow_bfloat16x2(value, 0.0f) & 0xffffu)};
  }
  SIMPO_DEVICE static Vector16 larger(const Vector16& a, const Vector16& b) {
    Vector16 result;
    SIMPO_UNROLL
    for (int i = 0; i < 4; ++i) result.words[i] = max_bfloat16x2(a.words[i], b.words[i]);
    return result;
  }
  SIMPO_DEVICE static float largest(const Vector16& v) {
    const uint32_t two = max_bfloat16x2(max_bfloat16x2(v.words[0], v.words[1]),
                                        max_bfloat16x2(v.words[2], v.words[3]));
    return cuda::larger(float_from_bits(two << 16), float_from_bits(two & 0xffff0000u));
  }
};

template <>
struct Elements<Float16> {
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInfinity[2] = {0xfc00fc00u, 0xfc00fc00u};

  SIMPO_DEVICE static float half_of(uint32_t word, int half) {
    return widen_float16(static_cast<uint16_t>(half == 0 ? word & 0xffffu : word >> 16));
  }
  SIMPO_DEVICE static float get(const Vector16& v, int k) { return half_of(v.words[k / 2], k % 2); }
  SIMPO_DEVICE static Vector16 pack(const float* values) {
    Vector16 result;
    SIMPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      result.words[i] = narrow_float16x2(values[2 * i], values[2 * i + 1]);
    }
    return result;
  }
  SIMPO_DEVICE static float widen(Float16 value) { return widen_float16(value.bits); }
  SIMPO_DEVICE static Float16 narrow(float value) {
    return {static_cast<uint16_t>(narrow_float16x2(value, 0.0f) & 0xffffu)};
  }
  SIMPO_DEVICE static Vector16 larger(const Vector16& a, const Vector16& b) {
    Vector16 result;
    SIMPO_UNROLL
    for (int i = 0; i < 4; ++i) result.words[i] = max_float16x2(a.words[i], b.words[i]);
    return result;
  }
  SIMPO_DEVICE static float largest(const Vector16& v) {
    const uint32_t two =
        max_float16x2(max_float16x2(v.words[0], v.words[1]), max_float16x2(v.words[2], v.words[3]));
    return cuda::larger(half_of(two, 0), half_of(two, 1));
  }
};

template <typename T>
SIMPO_DEVICE Vector16 minus_infinities() {
  constexpr uint32_t low = Elements<T>::kMinusInfinity[0], high = Elements<T>::kMinusInfinity[1];
  return {{low, high, low, high}};
}

}  // namespace simpo_ext::cuda
