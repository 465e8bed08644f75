// Vectors of AVX2 with FMA and F16C. simd_generic.h describes the functions.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtypes.h"

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

constexpr int64_t kVectorBytes = 32;
constexpr int kPairsPerStep = 1;

template <typename Scalar>
struct Vec;

// ---- float ----------------------------------------------------------------------------------

template <>
struct Vec<float> {
  static constexpr int64_t kSize = 8;
  __m256 v;

  Vec() = default;
  Vec(__m256 value) : v(value) {}
  explicit Vec(float value) : v(_mm256_set1_ps(value)) {}

  friend Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
};

struct Power {
  __m256 v;
};

inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
inline Vec<float> minus_multiple_of_ln2(Vec<float> x, Vec<float> n) {
  return _mm256_fnmadd_ps(n.v, _mm256_set1_ps(0x1.62e43p-1f), x.v);
}
inline Vec<float> larger(Vec<float> x, Vec<float> y) { return _mm256_max_ps(x.v, y.v); }
inline Vec<float> smaller(Vec<float> x, Vec<float> y) { return _mm256_min_ps(x.v, y.v); }
inline Vec<float> round(Vec<float> x) {
  return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// For an integer n: 1.5 * 2^23 + 127 leaves n + 127, the exponent of 2^n, in the lowest bits.
inline Power power_of_two(Vec<float> n) {
  const __m256 shifted = _mm256_add_ps(n.v, _mm256_set1_ps(12582912.0f + 127.0f));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23))};
}
inline Vec<float> times(Vec<float> x, Power power) { return _mm256_mul_ps(x.v, power.v); }
inline Vec<float> times_two_to(Vec<float> x, Vec<float> n) { return times(x, power_of_two(n)); }
inline Power split_exponent(Vec<float> t, Vec<float>& fraction) {
  const __m256 clamped = _mm256_max_ps(_mm256_set1_ps(-127.0f), t.v);
  const Vec<float> n = _mm256_floor_ps(clamped);
  fraction = Vec<float>(clamped) - n;
  return power_of_two(n);
}
inline Vec<float> abs(Vec<float> x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v); }
inline Vec<float> with_sign_of(Vec<float> magnitude, Vec<float> sign) {
  const __m256 mask = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(mask, sign.v), _mm256_andnot_ps(mask, magnitude.v));
}
inline Vec<float> first_lanes(Vec<float> x, int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t end = static_cast<int32_t>(count < 8 ? count : 8);
  const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lanes);
  return _mm256_and_ps(_mm256_castsi256_ps(keep), x.v);
}
inline float largest_lane(Vec<float> x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// ---- double ---------------------------------------------------------------------------------

template <>
struct Vec<double> {
  static constexpr int64_t kSize = 4;
  static constexpr double kExpIsZero = -709.1;
  __m256d v;

  Vec() = default;
  Vec(__m256d value) : v(value) {}
  explicit Vec(double value) : v(_mm256_set1_pd(value)) {}

  friend Vec operator+(Vec a, Vec b) { return _mm256_add_pd(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm256_sub_pd(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm256_mul_pd(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm256_div_pd(a.v, b.v); }
};

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a.v, b.v, c.v);
}
inline Vec<double> minus_multiple_of_ln2(Vec<double> x, Vec<double> n) {
  return _mm256_fnmadd_pd(n.v, _mm256_set1_pd(0x1.abc9e3b39803fp-56),
                          _mm256_fnmadd_pd(n.v, _mm256_set1_pd(0x1.62e42fefa39efp-1), x.v));
}
inline Vec<double> larger(Vec<double> x, Vec<double> y) { return _mm256_max_pd(x.v, y.v); }
inline Vec<double> smaller(Vec<double> x, Vec<double> y) { return _mm256_min_pd(x.v, y.v); }
inline Vec<double> round(Vec<double> x) {
  return _mm256_round_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec<double> times_two_to(Vec<double> x, Vec<double> n) {
  // 1.5 * 2^52 + 1023, as above.
  const __m256d shifted = _mm256_add_pd(n.v, _mm256_set1_pd(0x1.8p52 + 1023.0));
  const __m256i power = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
  return _mm256_mul_pd(x.v, _mm256_castsi256_pd(power));
}
inline Vec<double> abs(Vec<double> x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v); }
inline Vec<double> with_sign_of(Vec<double> magnitude, Vec<double> sign) {
  const __m256d mask = _mm256_set1_pd(-0.0);
  return _mm256_or_pd(_mm256_and_pd(mask, sign.v), _mm256_andnot_pd(mask, magnitude.v));
}
inline Vec<double> first_lanes(Vec<double> x, int64_t count) {
  const __m256i keep =
      _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  return _mm256_and_pd(_mm256_castsi256_pd(keep), x.v);
}
inline double largest_lane(Vec<double> x) {
  const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
}
inline double sum_of_lanes(Vec<double> x) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

inline void add_widened(Vec<float> x, Vec<double>& low, Vec<double>& high) {
  low = low + Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
  high = high + Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
}

// ---- memory ---------------------------------------------------------------------------------

inline Vec<float> load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec<double> load(const double* p) { return _mm256_loadu_pd(p); }
inline Vec<float> load(const BFloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Vec<float> load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <typename T>
inline void load_pair_in_any_order(const T* p, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  a = load(p);
  b = load(p + Vec<Compute<T>>::kSize);
}
// The even elements, then the odd ones: two operations instead of two widenings and two shifts.
template <>
inline void load_pair_in_any_order(const BFloat16* p, Vec<float>& a, Vec<float>& b) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
  b = _mm256_castsi256_ps(
      _mm256_and_si256(halves, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

template <bool kStreaming>
inline void store_bits(void* p, __m256i bits) {
  if constexpr (kStreaming) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
  }
}

template <bool kStreaming>
inline void store_pair(float* p, Vec<float> a, Vec<float> b) {
  store_bits<kStreaming>(p, _mm256_castps_si256(a.v));
  store_bits<kStreaming>(p + 8, _mm256_castps_si256(b.v));
}

template <bool kStreaming>
inline void store_pair(double* p, Vec<double> a, Vec<double> b) {
  store_bits<kStreaming>(p, _mm256_castpd_si256(a.v));
  store_bits<kStreaming>(p + 4, _mm256_castpd_si256(b.v));
}

// The results are in the lower half of each lane.
inline __m256i bfloat16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i is_odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff))), 16);
  // Rounding could carry from a NaN's mantissa and make it an infinity.
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x0040)), is_nan);
}

template <bool kStreaming>
inline void store_pair(BFloat16* p, Vec<float> a, Vec<float> b) {
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits(a.v), bfloat16_bits(b.v));
  store_bits<kStreaming>(p, _mm256_permute4x64_epi64(packed, 0xd8));
}

template <bool kStreaming>
inline void store_pair(Float16* p, Vec<float> a, Vec<float> b) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_bits<kStreaming>(
      p, _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(a.v, kNearest)),
                                 _mm256_cvtps_ph(b.v, kNearest), 1));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Other threads see the streaming stores before any later store of this thread.
inline void finish_streaming() { _mm_sfence(); }

}  // namespace
}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
