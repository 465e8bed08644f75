// The element types of logits, and their conversions to and from the type of the arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace simpo_ext {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type of the arithmetic on a row of T: float for types of up to 32 bits, otherwise double. It
// is also the type of logps and losses.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// Bytes of an element.
inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

SIMPO_HOST_DEVICE inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SIMPO_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

SIMPO_HOST_DEVICE inline double widen(double value) { return value; }
SIMPO_HOST_DEVICE inline float widen(float value) { return value; }
SIMPO_HOST_DEVICE inline float widen(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

SIMPO_HOST_DEVICE inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Exponent bias 15 -> 127. Infinities and NaNs get float's exponent of all ones.
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  // A subnormal is its mantissa times 2^-24. The mantissa is converted as an integer, because a
  // flush-to-zero mode would make a subnormal float 0.
  const uint32_t subnormal =
      float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_from_bits(sign | (magnitude < 0x0400u ? subnormal : normal));
}

// narrow<T> rounds to nearest, ties to even. NaN stays NaN, and overflow becomes infinity.
template <typename T>
SIMPO_HOST_DEVICE inline T narrow(Compute<T> value);

template <>
SIMPO_HOST_DEVICE inline double narrow<double>(double value) {
  return value;
}

template <>
SIMPO_HOST_DEVICE inline float narrow<float>(float value) {
  return value;
}

template <>
SIMPO_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding could carry from a NaN's mantissa and make it an infinity.
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x0040u : rounded)};
}

template <>
SIMPO_HOST_DEVICE inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 0.5 aligns the last mantissa bit with 2^-24, so the addition does the
  // rounding.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  // Selections instead of branches, so that loops over a row vectorize.
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return Float16{static_cast<uint16_t>(sign | half)};
}

}  // namespace simpo_ext
