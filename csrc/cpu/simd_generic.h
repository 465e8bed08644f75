// Vectors of 16 bytes in the compiler's own vector extension: SSE2, NEON, or the baseline of
// another architecture. The other simd_*.h define the same names for larger vectors.
//
// Vec<float> and Vec<double> have kSize lanes and +, -, *, /. Vec<double> has kExpIsZero, the least
// x whose exponent times_two_to can take. The functions:
//   fma(a, b, c)             a * b + c; rounded once if the instruction set can
//   minus_multiple_of_ln2    x - n * ln2, accurate to the rounding of the result
//   larger, smaller(x, y)    y if x is NaN
//   round(x)                 to the nearest integer; |x| < 2^22 (float), 2^51 (double)
//   times_two_to(x, n)       x * 2^n for an integer n. Below the range of the type: 0, or gradual
//                            underflow
//   split_exponent(t, fraction), times(x, power)
//                            times(x, split_exponent(t, f)) * 2^f = x * 2^t, with f in [0, 1]; 0
//                            for t below a bound that is at least -127; float only
//   first_lanes(x, count)    x in the first count lanes, 0 in the others
//   add_widened(x, low, high)
//                            adds the lanes of x to those of two vectors of double
//   load_pair_in_any_order   two vectors of consecutive elements, in the order that is cheapest;
//                            load() keeps the order in memory
//   store_pair<streaming>    two vectors, in order; streaming stores bypass the caches, and need an
//                            address that is a multiple of kVectorBytes
//   finish_streaming()       makes streaming stores visible before all later stores
#pragma once

#if defined(__ARM_NEON) && defined(__aarch64__)
#define SIMPO_NEON
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtypes.h"

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int kPairsPerStep = 2;  // pairs of vectors in a step of a loop over a row

namespace lanes {
using Float [[gnu::vector_size(16)]] = float;
using Double [[gnu::vector_size(16)]] = double;
using Int32 [[gnu::vector_size(16)]] = int32_t;
using Int64 [[gnu::vector_size(16)]] = int64_t;
using UInt32 [[gnu::vector_size(16)]] = uint32_t;
using UInt64 [[gnu::vector_size(16)]] = uint64_t;
using UInt16 [[gnu::vector_size(8)]] = uint16_t;
}  // namespace lanes

// The constants and types of each precision.
template <typename Scalar>
struct VecOf;

template <>
struct VecOf<float> {
  using Lanes = lanes::Float;
  using Bits = lanes::UInt32;
  static constexpr int64_t kSize = 4;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kBias = 127.0f;
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kSign = 0x80000000u;
  // ln2 in two parts. The first has so few bits that n times it is exact.
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
};

template <>
struct VecOf<double> {
  using Lanes = lanes::Double;
  using Bits = lanes::UInt64;
  static constexpr int64_t kSize = 2;
  static constexpr double kExpIsZero = -709.1;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kBias = 1023.0;
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kSign = 0x8000000000000000u;
  static constexpr double kLn2High = 0x1.62e42p-1;
  static constexpr double kLn2Low = 0x1.fdf473de6af28p-22;
};

template <typename Scalar>
struct Vec : VecOf<Scalar> {
  using Lanes = typename VecOf<Scalar>::Lanes;
  Lanes v;

  Vec() = default;
  Vec(Lanes value) : v(value) {}
  explicit Vec(Scalar value) : v(Lanes{} + value) {}

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
};

struct Power {
  Vec<float> v;
};

#if defined(SIMPO_NEON)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return reinterpret_cast<lanes::Float>(vfmaq_f32(c.v, a.v, b.v));
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return reinterpret_cast<lanes::Double>(vfmaq_f64(c.v, a.v, b.v));
}
#else
template <typename Scalar>
inline Vec<Scalar> fma(Vec<Scalar> a, Vec<Scalar> b, Vec<Scalar> c) {
  return a.v * b.v + c.v;
}
#endif
template <typename Scalar>
inline Vec<Scalar> minus_multiple_of_ln2(Vec<Scalar> x, Vec<Scalar> n) {
  const auto high = x.v - n.v * Vec<Scalar>::kLn2High;
  return high - n.v * Vec<Scalar>::kLn2Low;
}
template <typename Scalar>
inline Vec<Scalar> larger(Vec<Scalar> x, Vec<Scalar> y) {
  return x.v > y.v ? x.v : y.v;
}
template <typename Scalar>
inline Vec<Scalar> smaller(Vec<Scalar> x, Vec<Scalar> y) {
  return x.v < y.v ? x.v : y.v;
}
template <typename Scalar>
inline Vec<Scalar> round(Vec<Scalar> x) {
  const auto shifted = x.v + Vec<Scalar>::kRound;
  return shifted - Vec<Scalar>::kRound;
}
// 2^n for an integer n: the sum has n + bias, its exponent, in the lowest bits.
template <typename Scalar>
inline Vec<Scalar> power_of_two(Vec<Scalar> n) {
  const auto shifted = n.v + (Vec<Scalar>::kRound + Vec<Scalar>::kBias);
  const auto power = reinterpret_cast<typename Vec<Scalar>::Bits>(shifted)
                     << Vec<Scalar>::kMantissaBits;
  return reinterpret_cast<typename Vec<Scalar>::Lanes>(power);
}
template <typename Scalar>
inline Vec<Scalar> times_two_to(Vec<Scalar> x, Vec<Scalar> n) {
  return x * power_of_two(n);
}
inline Power split_exponent(Vec<float> t, Vec<float>& fraction) {
  const Vec<float> clamped = larger(Vec<float>(-126.5f), t);
  const Vec<float> n = round(clamped - Vec<float>(0.5f));  // at least -127
  fraction = clamped - n;
  return {power_of_two(n)};
}
inline Vec<float> times(Vec<float> x, Power power) { return x * power.v; }
template <typename Scalar>
inline Vec<Scalar> abs(Vec<Scalar> x) {
  const auto bits = reinterpret_cast<typename Vec<Scalar>::Bits>(x.v) & ~Vec<Scalar>::kSign;
  return reinterpret_cast<typename Vec<Scalar>::Lanes>(bits);
}
template <typename Scalar>
inline Vec<Scalar> with_sign_of(Vec<Scalar> magnitude, Vec<Scalar> sign) {
  using Bits = typename Vec<Scalar>::Bits;
  const Bits bits = (reinterpret_cast<Bits>(magnitude.v) & ~Vec<Scalar>::kSign) |
                    (reinterpret_cast<Bits>(sign.v) & Vec<Scalar>::kSign);
  return reinterpret_cast<typename Vec<Scalar>::Lanes>(bits);
}
template <typename Scalar>
inline Vec<Scalar> first_lanes(Vec<Scalar> x, int64_t count) {
  for (int64_t lane = 0; lane < Vec<Scalar>::kSize; ++lane) {
    if (lane >= count) x.v[lane] = Scalar(0);
  }
  return x;
}
template <typename Scalar>
inline Scalar largest_lane(Vec<Scalar> x) {
  Scalar largest = x.v[0];
  for (int64_t lane = 1; lane < Vec<Scalar>::kSize; ++lane) {
    largest = x.v[lane] > largest ? x.v[lane] : largest;
  }
  return largest;
}
inline double sum_of_lanes(Vec<double> x) { return x.v[0] + x.v[1]; }

inline void add_widened(Vec<float> x, Vec<double>& low, Vec<double>& high) {
  low.v += lanes::Double{static_cast<double>(x.v[0]), static_cast<double>(x.v[1])};
  high.v += lanes::Double{static_cast<double>(x.v[2]), static_cast<double>(x.v[3])};
}

// ---- memory ---------------------------------------------------------------------------------

template <typename T>
inline Vec<Compute<T>> load(const T* p) {
  using V = Vec<Compute<T>>;
  V x;
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    std::memcpy(&x.v, p, sizeof(x.v));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    lanes::UInt16 halves;
    std::memcpy(&halves, p, sizeof(halves));
    x.v = reinterpret_cast<lanes::Float>(__builtin_convertvector(halves, lanes::UInt32) << 16);
  } else {
#if defined(SIMPO_NEON)
    x.v = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
    Compute<T> values[V::kSize];
    for (int64_t lane = 0; lane < V::kSize; ++lane) values[lane] = widen(p[lane]);
    std::memcpy(&x.v, values, sizeof(x.v));
#endif
  }
  return x;
}

template <typename T>
inline void load_pair_in_any_order(const T* p, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  a = load(p);
  b = load(p + Vec<Compute<T>>::kSize);
}
// The even elements, then the odd ones: the halves of little-endian words.
template <>
inline void load_pair_in_any_order(const BFloat16* p, Vec<float>& a, Vec<float>& b) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  lanes::UInt32 halves;
  std::memcpy(&halves, p, sizeof(halves));
  a.v = reinterpret_cast<lanes::Float>(halves << 16);
  b.v = reinterpret_cast<lanes::Float>(halves & 0xffff0000u);
}

// narrow<BFloat16> of core/dtypes.h.
inline void store(BFloat16* p, Vec<float> x) {
  const lanes::UInt32 bits = reinterpret_cast<lanes::UInt32>(x.v);
  const lanes::UInt32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const lanes::UInt32 nan = (bits >> 16) | 0x0040u;
  const lanes::UInt32 chosen = x.v == x.v ? rounded : nan;
  const lanes::UInt16 halves = __builtin_convertvector(chosen, lanes::UInt16);
  std::memcpy(p, &halves, sizeof(halves));
}

inline void store(Float16* p, Vec<float> x) {
#if defined(SIMPO_NEON)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
#else
  float values[Vec<float>::kSize];
  std::memcpy(values, &x.v, sizeof(values));
  Float16 halves[Vec<float>::kSize];
  for (int64_t lane = 0; lane < Vec<float>::kSize; ++lane) {
    halves[lane] = narrow<Float16>(values[lane]);
  }
  std::memcpy(p, halves, sizeof(halves));
#endif
}

template <typename Scalar>
inline void store(Scalar* p, Vec<Scalar> x) {
  std::memcpy(p, &x.v, sizeof(x.v));
}

template <bool kStreaming, typename T>
inline void store_pair(T* p, Vec<Compute<T>> a, Vec<Compute<T>> b) {
  store(p, a);
  store(p + Vec<Compute<T>>::kSize, b);
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline void finish_streaming() {}  // the stores above never stream

}  // namespace
}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
