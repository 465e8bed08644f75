// Vectors of AVX-512 (F, BW, DQ, VL), with its bfloat16 conversion if the compiler may use it.
// simd_generic.h describes the functions.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtypes.h"

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

constexpr int64_t kVectorBytes = 64;
constexpr int kPairsPerStep = 2;

template <typename Scalar>
struct Vec;

// ---- float ----------------------------------------------------------------------------------

template <>
struct Vec<float> {
  static constexpr int64_t kSize = 16;
  __m512 v;

  Vec() = default;
  Vec(__m512 value) : v(value) {}
  explicit Vec(float value) : v(_mm512_set1_ps(value)) {}

  friend Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
};

struct Power {
  Vec<float> v;
};

inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
inline Vec<float> minus_multiple_of_ln2(Vec<float> x, Vec<float> n) {
  return _mm512_fnmadd_ps(n.v, _mm512_set1_ps(0x1.62e43p-1f), x.v);
}
inline Vec<float> larger(Vec<float> x, Vec<float> y) { return _mm512_max_ps(x.v, y.v); }
inline Vec<float> smaller(Vec<float> x, Vec<float> y) { return _mm512_min_ps(x.v, y.v); }
inline Vec<float> round(Vec<float> x) {
  return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec<float> times_two_to(Vec<float> x, Vec<float> n) { return _mm512_scalef_ps(x.v, n.v); }
inline Power split_exponent(Vec<float> t, Vec<float>& fraction) {
  fraction = _mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return {t};  // scalef takes its floor
}
inline Vec<float> times(Vec<float> x, Power power) { return _mm512_scalef_ps(x.v, power.v.v); }
inline Vec<float> abs(Vec<float> x) { return _mm512_abs_ps(x.v); }
inline Vec<float> with_sign_of(Vec<float> magnitude, Vec<float> sign) {
  const __m512i mask = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign.v),
                                                       _mm512_castps_si512(magnitude.v), 0xca));
}
inline Vec<float> first_lanes(Vec<float> x, int64_t count) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u),
                             x.v);
}
inline float largest_lane(Vec<float> x) { return _mm512_reduce_max_ps(x.v); }

// ---- double ---------------------------------------------------------------------------------

template <>
struct Vec<double> {
  static constexpr int64_t kSize = 8;
  static constexpr double kExpIsZero = -1500.0;
  __m512d v;

  Vec() = default;
  Vec(__m512d value) : v(value) {}
  explicit Vec(double value) : v(_mm512_set1_pd(value)) {}

  friend Vec operator+(Vec a, Vec b) { return _mm512_add_pd(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_pd(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_pd(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_pd(a.v, b.v); }
};

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a.v, b.v, c.v);
}
inline Vec<double> minus_multiple_of_ln2(Vec<double> x, Vec<double> n) {
  return _mm512_fnmadd_pd(n.v, _mm512_set1_pd(0x1.abc9e3b39803fp-56),
                          _mm512_fnmadd_pd(n.v, _mm512_set1_pd(0x1.62e42fefa39efp-1), x.v));
}
inline Vec<double> larger(Vec<double> x, Vec<double> y) { return _mm512_max_pd(x.v, y.v); }
inline Vec<double> smaller(Vec<double> x, Vec<double> y) { return _mm512_min_pd(x.v, y.v); }
inline Vec<double> round(Vec<double> x) {
  return _mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec<double> times_two_to(Vec<double> x, Vec<double> n) { return _mm512_scalef_pd(x.v, n.v); }
inline Vec<double> abs(Vec<double> x) { return _mm512_abs_pd(x.v); }
inline Vec<double> with_sign_of(Vec<double> magnitude, Vec<double> sign) {
  const __m512i mask = _mm512_set1_epi64(INT64_MIN);
  return _mm512_castsi512_pd(_mm512_ternarylogic_epi64(mask, _mm512_castpd_si512(sign.v),
                                                       _mm512_castpd_si512(magnitude.v), 0xca));
}
inline Vec<double> first_lanes(Vec<double> x, int64_t count) {
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(count >= 8 ? 0xffu : (1u << count) - 1u), x.v);
}
inline double largest_lane(Vec<double> x) { return _mm512_reduce_max_pd(x.v); }
inline double sum_of_lanes(Vec<double> x) { return _mm512_reduce_add_pd(x.v); }

inline void add_widened(Vec<float> x, Vec<double>& low, Vec<double>& high) {
  low = low + Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
  high = high + Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
}

// ---- memory ---------------------------------------------------------------------------------

inline Vec<float> load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec<double> load(const double* p) { return _mm512_loadu_pd(p); }
inline Vec<float> load(const BFloat16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vec<float> load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <typename T>
inline void load_pair_in_any_order(const T* p, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  a = load(p);
  b = load(p + Vec<Compute<T>>::kSize);
}
// The even elements, then the odd ones: two operations instead of two widenings and two shifts.
template <>
inline void load_pair_in_any_order(const BFloat16* p, Vec<float>& a, Vec<float>& b) {
  const __m512i halves = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
  b = _mm512_castsi512_ps(
      _mm512_and_si512(halves, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

template <bool kStreaming>
inline void store_bits(void* p, __m512i bits) {
  if constexpr (kStreaming) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bits);
  } else {
    _mm512_storeu_si512(p, bits);
  }
}

template <bool kStreaming>
inline void store_pair(float* p, Vec<float> a, Vec<float> b) {
  store_bits<kStreaming>(p, _mm512_castps_si512(a.v));
  store_bits<kStreaming>(p + 16, _mm512_castps_si512(b.v));
}

template <bool kStreaming>
inline void store_pair(double* p, Vec<double> a, Vec<double> b) {
  store_bits<kStreaming>(p, _mm512_castpd_si512(a.v));
  store_bits<kStreaming>(p + 8, _mm512_castpd_si512(b.v));
}

#if defined(__AVX512BF16__)
template <bool kStreaming>
inline void store_pair(BFloat16* p, Vec<float> a, Vec<float> b) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(b.v, a.v);
  __m512i bits;
  static_assert(sizeof(bits) == sizeof(halves));
  __builtin_memcpy(&bits, &halves, sizeof(bits));
  store_bits<kStreaming>(p, bits);
}
#else
inline __m256i bfloat16_bits(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i is_odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff))), 16);
  // Rounding could carry from a NaN's mantissa and make it an infinity.
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x0040)));
}

template <bool kStreaming>
inline void store_pair(BFloat16* p, Vec<float> a, Vec<float> b) {
  store_bits<kStreaming>(
      p, _mm512_inserti64x4(_mm512_castsi256_si512(bfloat16_bits(a.v)), bfloat16_bits(b.v), 1));
}
#endif

template <bool kStreaming>
inline void store_pair(Float16* p, Vec<float> a, Vec<float> b) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_bits<kStreaming>(p,
                         _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a.v, kNearest)),
                                            _mm512_cvtps_ph(b.v, kNearest), 1));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Other threads see the streaming stores before any later store of this thread.
inline void finish_streaming() { _mm_sfence(); }

}  // namespace
}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
