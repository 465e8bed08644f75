// exp for the row loops: free of branches and of library calls, so that compilers vectorise it for
// any instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtypes.h"

namespace simpo_ext::cpu {

// exp(x) for x <= 88, relative error below 9e-8 in [-87, 88]; below that 0 (so -inf gives 0); NaN
// stays.
inline float fast_exp(float x) {
  // x = n ln2 + r with |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves n in the
  // low mantissa bits; ln2 in two parts makes n * kLn2High exact.
  constexpr float kRound = 12582912.0f;
  constexpr uint32_t kRoundBits = 0x4b400000u;
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // exp(r) = 1 + r + r^2 q(r), q the minimax polynomial for relative error: 3e-9 before rounding.
  float q = 1.381459878757596e-3f;
  q = q * r + 8.368716575205326e-3f;
  q = q * r + 4.166838899254799e-2f;
  q = q * r + 1.666652113199234e-1f;
  q = q * r + 4.999999403953552e-1f;
  const float exp_r = (q * (r * r) + r) + 1.0f;
  const float two_to_n = float_from_bits((float_bits(shifted) - kRoundBits + 127u) << 23);
  return x < -87.0f ? 0.0f : exp_r * two_to_n;
}

inline double fast_exp(double x) { return std::exp(x); }

}  // namespace simpo_ext::cpu
