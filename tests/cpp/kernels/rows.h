// Rows for the row kernels, and the errors that exp may have.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/capability.h"

namespace simpo_ext::test {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, long double, double>;

template <typename T>
constexpr double kEpsilon = std::numeric_limits<Compute<T>>::epsilon();

template <typename T>
T from_double(double value) {
  return narrow<T>(static_cast<Compute<T>>(value));
}
template <typename T>
double to_double(T value) {
  return static_cast<double>(widen(value));
}

template <typename T>
double largest_finite() {
  if constexpr (std::is_same_v<T, double>) return std::numeric_limits<double>::max();
  return std::is_same_v<T, Float16> ? 65504.0 : 3.0e38;
}

template <typename T>
double z_of(const LogitTransform& transform, T x) {
  return cpu::row_kernels().z(Named<T>::dtype, transform, &x);
}

// The relative error of exp(distance), or of a multiple of it. In float, a polynomial is within a
// rounding of exp. The multiple is part of its rounded coefficients. Together with its last
// operations that makes 4 half ulps. Its argument, a product with log2(e), is off by half an ulp
// and a third of one. In double, that is corrected.
template <typename T>
Wide<T> exp_error(Wide<T> distance) {
  if constexpr (std::is_same_v<T, double>) return Wide<T>(4e-16);
  return Wide<T>(2.4e-7) + Wide<T>(8e-8) * std::fabs(distance);
}

template <typename T>
void describe(const NamedTransform& named, const char* what, int64_t n) {
  context = std::string("at ") + Named<T>::name + ", " + named.name + ", " + what +
            ", n = " + std::to_string(n);
}

inline bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// The longest run.
constexpr int64_t kCapacity = 70001;

// ---- rows -----------------------------------------------------------------------------------

// Vectors of every instruction set, tails of every length, unrolled steps, batches of float sums
// (32 vectors of 4 to 16 lanes, 1024, 2048), and blocks of 8192: each one less, exactly, and more.
inline std::vector<int64_t> sizes() {
  std::vector<int64_t> all;
  for (int64_t n = 1; n <= 70; ++n) all.push_back(n);
  for (const int64_t n :
       {127, 128, 129, 130, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 2050, 8191, 8193}) {
    all.push_back(n);
  }
  return all;
}

struct Pattern {
  const char* name;
  // The longest run to sum: more than a block only for kinds whose blocks differ.
  int64_t longest;
  // The logit at i of n. largest is the largest finite number of the dtype.
  double (*value)(int64_t i, int64_t n, double largest, std::mt19937& random);
};

inline double normal(std::mt19937& random) { return std::normal_distribution<double>()(random); }

// Half the run, but more than a block of 8192 if the run is long enough.
inline int64_t long_prefix(int64_t n) { return n > 16384 ? 9000 : n / 2; }

inline constexpr Pattern kPatterns[] = {
    // Like a trained model's: a few large ones, most of them small.
    {"peaked", kCapacity,
     [](int64_t, int64_t, double, std::mt19937& random) {
       return 2.0 * normal(random) + (random() % 500 == 0 ? 12.0 : 0.0);
     }},
    // Equal terms, for which a float sum drifts most.
    {"nearly flat", 8193,
     [](int64_t, int64_t, double, std::mt19937& random) { return 0.01 * normal(random); }},
    {"flat", 8193, [](int64_t, int64_t, double, std::mt19937&) { return -0.3; }},
    // A common offset, which drops out except for float's rounding at that size.
    {"offset 1e4", 8193,
     [](int64_t, int64_t, double largest, std::mt19937& random) {
       return std::min(1e4, largest) + 3.0 * normal(random);
     }},
    {"offset -1e8", 8193,
     [](int64_t, int64_t, double largest, std::mt19937& random) {
       return std::max(-1e8, -largest / 2) + 20.0 * normal(random);
     }},
    // Differences that overflow.
    {"huge", 16389,
     [](int64_t, int64_t, double largest, std::mt19937& random) {
       const double choice[] = {largest, -largest, largest / 3, normal(random), 0.0};
       return choice[random() % 5];
     }},
    {"all -inf", 8193, [](int64_t, int64_t, double, std::mt19937&) { return -kInfinity; }},
    // Large negative numbers first, as some programs mask logits.
    {"-inf first", kCapacity,
     [](int64_t i, int64_t n, double, std::mt19937& random) {
       return i < long_prefix(n) ? -kInfinity : 3.0 * normal(random);
     }},
    {"lowest first", 16389,
     [](int64_t i, int64_t n, double largest, std::mt19937& random) {
       return i < long_prefix(n) ? -largest : 3.0 * normal(random);
     }},
    {"-1e30 first", 8193,
     [](int64_t i, int64_t n, double largest, std::mt19937& random) {
       return i < long_prefix(n) ? std::max(-1e30, -largest) : 3.0 * normal(random);
     }},
    // A last logit that outweighs all others.
    {"large at the end", 16389,
     [](int64_t i, int64_t n, double, std::mt19937& random) {
       return i == n - 1 ? 90.0 : normal(random);
     }},
    // Every block above all before it, by a little or by more than the range of float's exp.
    {"ascending", kCapacity,
     [](int64_t i, int64_t, double, std::mt19937& random) {
       return 0.002 * static_cast<double>(i) + normal(random);
     }},
    {"ascending steeply", 16389,
     [](int64_t i, int64_t, double, std::mt19937&) { return 0.015 * static_cast<double>(i) - 90; }},
    {"descending", 8193,
     [](int64_t i, int64_t, double, std::mt19937& random) {
       return -0.002 * static_cast<double>(i) + normal(random);
     }},
};

template <typename T>
std::vector<T> make_row(const Pattern& pattern, int64_t n, std::mt19937& random) {
  std::vector<T> x;
  for (int64_t i = 0; i < n; ++i) {
    x.push_back(from_double<T>(pattern.value(i, n, largest_finite<T>(), random)));
  }
  return x;
}

}  // namespace simpo_ext::test
