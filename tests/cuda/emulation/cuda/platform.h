// The emulated counterpart of csrc/cuda/platform.h: the same names, run by the emulator on the CPU.
// It stands in for the real one when tests/cuda/emulation comes before csrc in the include path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../emulator.h"
#include "core/dtypes.h"

// ---- CUDA's own spelling --------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline void __syncthreads(
    simpo_ext::emulation::SourceLocation where = simpo_ext::emulation::SourceLocation::current()) {
  simpo_ext::emulation::wait_for_block(where);
}

inline void __syncwarp(
    unsigned mask = 0xffffffffu,
    simpo_ext::emulation::SourceLocation where = simpo_ext::emulation::SourceLocation::current()) {
  simpo_ext::emulation::exchange_in_warp("__syncwarp", mask, 0, simpo_ext::emulation::lane(),
                                         where);
}

namespace simpo_ext::emulation {

template <typename T>
T exchange_value(const char* collective, unsigned mask, T value, unsigned source_lane,
                 SourceLocation where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = exchange_in_warp(collective, mask, bits, source_lane, where);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace simpo_ext::emulation

template <typename T>
T __shfl_sync(
    unsigned mask, T value, int source_lane,
    simpo_ext::emulation::SourceLocation where = simpo_ext::emulation::SourceLocation::current()) {
  using namespace simpo_ext::emulation;
  return exchange_value("__shfl_sync", mask, value, static_cast<unsigned>(source_lane) % kWarpSize,
                        where);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask,
    simpo_ext::emulation::SourceLocation where = simpo_ext::emulation::SourceLocation::current()) {
  using namespace simpo_ext::emulation;
  return exchange_value("__shfl_xor_sync", mask, value,
                        (lane() ^ static_cast<unsigned>(lane_mask)) % kWarpSize, where);
}

// ---- the project's --------------------------------------------------------------------------

#define SIMPO_DEVICE inline
#define SIMPO_UNROLL

// The address of a static variable identifies the array: one for each instantiation of a template,
// in any number of translation units. As in CUDA, the elements have no initial value.
#define SIMPO_SHARED(T, name, n)                                                   \
  static_assert(std::is_trivially_default_constructible_v<T> && alignof(T) <= 16); \
  static char name##_identity;                                                     \
  using name##_array = T[n];                                                       \
  name##_array& name = *static_cast<name##_array*>(                                \
      ::simpo_ext::emulation::shared_array(&name##_identity, sizeof(name##_array)))

namespace simpo_ext::emulation {

// max.{bf16,f16}: of a number and a NaN, the number; of two NaN, 0x7fff; +0 is larger than -0.
template <typename Half>
uint16_t max_of_halves(uint16_t a, uint16_t b) {
  const float wide_a = widen(Half{a}), wide_b = widen(Half{b});
  if (std::isnan(wide_a)) return std::isnan(wide_b) ? 0x7fffu : b;
  if (std::isnan(wide_b)) return a;
  if (wide_a == wide_b) return a & b;  // the same bits, or +0 and -0
  return wide_a > wide_b ? a : b;
}

template <typename Half>
uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t pair, int shift) { return static_cast<uint16_t>(pair >> shift); };
  const uint32_t low = max_of_halves<Half>(half(a, 0), half(b, 0));
  const uint32_t high = max_of_halves<Half>(half(a, 16), half(b, 16));
  return low | high << 16;
}

}  // namespace simpo_ext::emulation

namespace simpo_ext::cuda {

using Stream = void*;

constexpr int64_t kMaxGridX = emulation::kMaxGridX;
constexpr int64_t kMaxGridY = emulation::kMaxGridY;
constexpr int64_t kBusyBlocks = 60;  // so that small batches have fewer rows, or more

struct alignas(16) Vector16 {
  uint32_t words[4];
};

template <typename T>
T load(const T* address, emulation::SourceLocation where = emulation::SourceLocation::current()) {
  emulation::before_load(address, sizeof(T), alignof(T), where);
  return *address;
}

template <typename T>
T load_uniform(const T* address,
               emulation::SourceLocation where = emulation::SourceLocation::current()) {
  emulation::before_uniform_load(address, sizeof(T), alignof(T), where);
  return *address;
}

template <typename T>
T load_uniform_early(const T* address,
                     emulation::SourceLocation where = emulation::SourceLocation::current()) {
  return load_uniform(address, where);
}

template <typename T>
void store(T* address, T value,
           emulation::SourceLocation where = emulation::SourceLocation::current()) {
  emulation::before_store(address, sizeof(T), alignof(T), where);
  *address = value;
}

// memcpy, because the memory has another type: the compiler could move an access through Vector16*
// across one to an element.
inline Vector16 load_streaming(const Vector16* address, emulation::SourceLocation where =
                                                            emulation::SourceLocation::current()) {
  emulation::before_load(address, sizeof(Vector16), alignof(Vector16), where);
  Vector16 value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

inline Vector16 load_cached(const Vector16* address, emulation::SourceLocation where =
                                                         emulation::SourceLocation::current()) {
  return load_streaming(address, where);
}

inline void store_streaming(
    Vector16* address, Vector16 value,
    emulation::SourceLocation where = emulation::SourceLocation::current()) {
  emulation::before_store(address, sizeof(Vector16), alignof(Vector16), where);
  std::memcpy(address, &value, sizeof(value));
}

// Like ex2.approx.ftz.f32: 0 below the least normal number, exact at integers, and otherwise off by
// up to 2 ulp, as the documentation allows. The error depends only on the bits of x.
inline float exp2_approx(float x) {
  const float power = std::exp2(x);
  if (power < 0x1p-126f) return 0.0f;
  if (!std::isfinite(power) || x == std::trunc(x)) return power;
  const int ulps = static_cast<int>(float_bits(x) * 2654435761u >> 16) % 5 - 2;
  return float_from_bits(float_bits(power) + static_cast<uint32_t>(ulps));
}

// Like rcp.approx.ftz.f32: exact at powers of two, and otherwise off by up to 1 ulp.
inline float reciprocal_approx(float x) {
  const float inverse = 1.0f / x;
  int exponent;
  if (std::fabs(inverse) < 0x1p-126f) return std::copysign(0.0f, inverse);
  if (!std::isfinite(inverse) || std::fabs(std::frexp(x, &exponent)) == 0.5f) return inverse;
  const int ulps = static_cast<int>(float_bits(x) * 2654435761u >> 16) % 3 - 1;
  return float_from_bits(float_bits(inverse) + static_cast<uint32_t>(ulps));
}

// The empty assembly hides from the compiler that the value is a product.
template <typename Scalar>
Scalar multiply_rounded(Scalar a, Scalar b) {
  using Bits = std::conditional_t<sizeof(Scalar) == 8, uint64_t, uint32_t>;
  Scalar product = a * b;
  Bits bits;
  std::memcpy(&bits, &product, sizeof(bits));
  asm("" : "+r"(bits));
  std::memcpy(&product, &bits, sizeof(bits));
  return product;
}

inline float widen_float16(uint16_t bits) { return widen(Float16{bits}); }

inline uint32_t narrow_bfloat16x2(float low, float high) {
  return narrow<BFloat16>(low).bits | static_cast<uint32_t>(narrow<BFloat16>(high).bits) << 16;
}

inline uint32_t narrow_float16x2(float low, float high) {
  return narrow<Float16>(low).bits | static_cast<uint32_t>(narrow<Float16>(high).bits) << 16;
}

inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  return emulation::max_of_pairs<BFloat16>(a, b);
}

inline uint32_t max_float16x2(uint32_t a, uint32_t b) {
  return emulation::max_of_pairs<Float16>(a, b);
}

// Runs the kernel before it returns.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream /*stream*/,
           Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  const auto thread = [kernel, ... values = static_cast<Parameters>(
                                   std::forward<Arguments>(arguments))] { kernel(values...); };
  using Thread = decltype(thread);
  return emulation::run_grid(
      reinterpret_cast<const void*>(kernel), grid, block,
      [](const void* context) { (*static_cast<Thread*>(context))(); }, &thread);
}

}  // namespace simpo_ext::cuda
