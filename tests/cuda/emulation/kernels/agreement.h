// Compares the results of two kernels that add up in different orders.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "kernels/buffers.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {

// For the CPU kernels.
constexpr ParallelFor kOneThread{[](int64_t begin, int64_t end, int64_t, ParallelFor::Body body,
                                    void* context) { body(begin, end, context); },
                                 [] { return int64_t{1}; }};

// float: one unit in the last place. double: 1e-15. Sums are compensated, so they agree in any
// order before the last rounding. After that, both kernels run the same code.
inline bool agree(float got, float expected) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::nextafter(got, expected) == expected;
}
inline bool agree(double got, double expected) {
  return is_close(got, expected, 1e-15 * std::fabs(expected));
}
inline bool agree(int64_t got, int64_t expected) { return got == expected; }

// The same bits, or two NaN, whose sign and payload do not matter.
template <typename T>
void require_same_bits(const T* got, const T* expected, int64_t count, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    const bool are_nan = got[i] != got[i] && expected[i] != expected[i];
    require(are_nan || std::memcmp(got + i, expected + i, sizeof(T)) == 0, what,
            static_cast<double>(got[i]), static_cast<double>(expected[i]));
  }
}

// slack: the error of sums without compensation, relative to the largest.
template <typename T>
void require_agreement(const Buffer<T>& got, const Buffer<T>& expected, const char* what,
                       double slack = 0.0) {
  double largest = 0.0;
  for (int64_t i = 0; i < expected.size() && slack > 0.0; ++i) {
    const double size = std::fabs(static_cast<double>(expected[i]));
    if (std::isfinite(size)) largest = std::max(largest, size);
  }
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double a = static_cast<double>(got[i]), b = static_cast<double>(expected[i]);
    require(agree(got[i], expected[i]) || std::fabs(a - b) <= slack * largest, what, a, b);
  }
}

}  // namespace simpo_ext::kernel_tests
