// The elements of a 16-byte vector of logits, for each dtype, and exp at its precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtypes.h"
#include "cuda/platform.h"

namespace simpo_ext::cuda {

// exp(x) with a relative error of about 2e-7 + |x| 6e-8, because x log2(e) is rounded. Results
// below float's normal range are 0.
SIMPO_DEVICE float fast_exp(float x) { return exp2_approx(x * 1.44269504f); }
SIMPO_DEVICE double fast_exp(double x) { return std::exp(x); }

// The larger value; the number if the other is NaN.
template <typename Scalar>
SIMPO_DEVICE Scalar larger(Scalar a, Scalar b) {
  return std::fmax(a, b);
}

// get(v, k): element k. pack(values): the vector of narrowed values. larger(a, b): the larger of
// each element. largest(v): the largest element. kMinusInfinity: two words, all of whose elements
// are -inf.
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

// ---- two elements a word, the first in the low half

template <typename T>
struct Half;

template <>
struct Half<BFloat16> {
  static constexpr uint32_t kMinusInfinities = 0xff80ff80u;

  SIMPO_DEVICE static float low(uint32_t word) { return float_from_bits(word << 16); }
  SIMPO_DEVICE static float high(uint32_t word) { return float_from_bits(word & 0xffff0000u); }
  SIMPO_DEVICE static uint32_t narrow(float low, float high) {
    return narrow_bfloat16x2(low, high);
  }
  SIMPO_DEVICE static uint32_t larger(uint32_t a, uint32_t b) { return max_bfloat16x2(a, b); }
};

template <>
struct Half<Float16> {
  static constexpr uint32_t kMinusInfinities = 0xfc00fc00u;

  SIMPO_DEVICE static float low(uint32_t word) {
    return widen_float16(static_cast<uint16_t>(word & 0xffffu));
  }
  SIMPO_DEVICE static float high(uint32_t word) {
    return widen_float16(static_cast<uint16_t>(word >> 16));
  }
  SIMPO_DEVICE static uint32_t narrow(float low, float high) { return narrow_float16x2(low, high); }
  SIMPO_DEVICE static uint32_t larger(uint32_t a, uint32_t b) { return max_float16x2(a, b); }
};

template <typename T>
struct HalfElements {
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInfinity[2] = {Half<T>::kMinusInfinities,
                                                 Half<T>::kMinusInfinities};

  SIMPO_DEVICE static float get(const Vector16& v, int k) {
    const uint32_t word = v.words[k / 2];
    return k % 2 == 0 ? Half<T>::low(word) : Half<T>::high(word);
  }
  SIMPO_DEVICE static Vector16 pack(const float* values) {
    Vector16 result;
    SIMPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      result.words[i] = Half<T>::narrow(values[2 * i], values[2 * i + 1]);
    }
    return result;
  }
  SIMPO_DEVICE static float widen(T value) { return Half<T>::low(value.bits); }
  SIMPO_DEVICE static T narrow(float value) {
    return {static_cast<uint16_t>(Half<T>::narrow(value, 0.0f) & 0xffffu)};
  }
  SIMPO_DEVICE static Vector16 larger(const Vector16& a, const Vector16& b) {
    Vector16 result;
    SIMPO_UNROLL
    for (int i = 0; i < 4; ++i) result.words[i] = Half<T>::larger(a.words[i], b.words[i]);
    return result;
  }
  SIMPO_DEVICE static float largest(const Vector16& v) {
    const uint32_t two = Half<T>::larger(Half<T>::larger(v.words[0], v.words[1]),
                                         Half<T>::larger(v.words[2], v.words[3]));
    return cuda::larger(Half<T>::low(two), Half<T>::high(two));
  }
};

template <>
struct Elements<BFloat16> : HalfElements<BFloat16> {};

template <>
struct Elements<Float16> : HalfElements<Float16> {};

template <typename T>
SIMPO_DEVICE Vector16 minus_infinities() {
  constexpr uint32_t low = Elements<T>::kMinusInfinity[0], high = Elements<T>::kMinusInfinity[1];
  return {{low, high, low, high}};
}

}  // namespace simpo_ext::cuda
