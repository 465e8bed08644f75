// z and sum_exp of the current instruction set, compared with plain computations in double, or in
// long double for float64.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/row_kernels.h"
#include "fence.h"
#include "rows.h"

namespace simpo_ext::test {
namespace {

// ---- z --------------------------------------------------------------------------------------

template <typename T>
void check_z_at(const NamedTransform& named, T x) {
  using Scalar = Compute<T>;
  const LogitTransform& transform = named.transform;
  const double got = z_of(transform, x);
  const Scalar wide = widen(x);
  if (std::isnan(wide)) return require(std::isnan(got), "z of NaN");
  if (transform.softcap == 0.0) {
    const double expected = static_cast<double>(wide * static_cast<Scalar>(transform.logit_scale));
    require(got == expected, "z", got, expected);
  } else {
    const Wide<T> ratio = Wide<T>(wide) * Wide<T>(transform.logit_scale / transform.softcap);
    const Wide<T> expected = Wide<T>(transform.softcap) * std::tanh(ratio);
    // The roundings of the argument, of its factor, of tanh and of the product: 5 half ulps.
    require(std::fabs(Wide<T>(got) - expected) <= Wide<T>(2.5 * kEpsilon<T>) * std::fabs(expected),
            "capped z", got, static_cast<double>(expected));
    require(std::fabs(got) <= transform.softcap, "z is within the cap", got);
    if (std::isinf(wide)) {
      require(got == std::copysign(transform.softcap, to_double(x)), "z of infinity is the cap",
              got);
    }
  }
  // As the only logit, in the body of a run, and in its tail. 69 is odd, and longer than a step of
  // any instruction set.
  const std::vector<T> run(69, x);
  for (const int64_t n : {1, 69}) {
    const cpu::RunSum sum =
        cpu::row_kernels().sum_exp(Named<T>::dtype, transform, run.data(), n, -kInfinity);
    require(same_bits(sum.max, got), "z is what the sum takes for the maximum", sum.max, got);
  }
}

template <typename T>
void check_z(std::mt19937& random) {
  for (const NamedTransform& named : kTransforms) {
    describe<T>(named, "z", 1);
    for (const double x : {0.0, kInfinity, -kInfinity, kNaN}) {
      check_z_at<T>(named, from_double<T>(x));
    }
    // Where tanh is close to its argument, where it bends, and where it is 1.
    const double top = largest_finite<T>() < 1e30 ? 4.0 : 30.0, bottom = top == 4.0 ? -4.0 : -30.0;
    std::uniform_real_distribution<double> exponent(bottom, top), bend(-12.0, 12.0);
    for (int i = 0; i < 4000; ++i) {
      const double x = std::pow(10.0, exponent(random));
      check_z_at<T>(named, from_double<T>(i % 2 ? x : -x));
      check_z_at<T>(named, from_double<T>(bend(random)));
    }
  }
}

// ---- sum_exp --------------------------------------------------------------------------------

struct Sum {
  long double value;
  long double slack;  // the error that is allowed
};

template <typename T>
Sum expected_sum(const std::vector<double>& z, double max) {
  Sum expected{0, 0};
  if (max == -kInfinity) return expected;
  Wide<T> value = 0, distances = 0;
  for (const double z_i : z) {
    const Wide<T> distance = Wide<T>(z_i) - Wide<T>(max), term = std::exp(distance);
    if (term == 0) continue;
    value += term;
    distances -= term * distance;
  }
  // Each term has the error of its exp. For each unit of distance from the reference, it also has
  // half an ulp of the difference and half an ulp of its product with log2(e). A lane adds up about
  // 32 terms. If many of them are equal, these roundings have the same sign: 8 ulps in all.
  expected.value = value;
  expected.slack = kEpsilon<T> * (8 * value + distances) +
                   static_cast<long double>(z.size()) *
                       static_cast<long double>(std::numeric_limits<Compute<T>>::min());
  return expected;
}

template <typename T>
struct SumRoom {
  Fence<T> fence{kCapacity};

  // The start of the run in memory must not change the result. Long runs do not try every hint.
  cpu::RunSum sum_exp(const LogitTransform& transform, const std::vector<T>& x, double hint,
                      bool is_first_hint) {
    const int64_t n = static_cast<int64_t>(x.size());
    T* run = fence.place_last(n);
    std::memcpy(run, x.data(), x.size() * sizeof(T));
    const cpu::RunSum sum = cpu::row_kernels().sum_exp(Named<T>::dtype, transform, run, n, hint);
    if (n > 300 && !is_first_hint) return sum;
    for (const int64_t start : {0, 1}) {
      run = fence.place(start, n);
      std::memcpy(run, x.data(), x.size() * sizeof(T));
      const cpu::RunSum other =
          cpu::row_kernels().sum_exp(Named<T>::dtype, transform, run, n, hint);
      const bool same = std::isnan(sum.sum)
                            ? std::isnan(other.sum)
                            : same_bits(sum.max, other.max) && same_bits(sum.sum, other.sum);
      require(same, "a sum does not depend on where the run begins", other.sum, sum.sum);
    }
    return sum;
  }
};

template <typename T>
void check_sum(const NamedTransform& named, const std::vector<T>& x, SumRoom<T>& room) {
  using Scalar = Compute<T>;
  std::vector<double> z;
  for (const T x_i : x) z.push_back(z_of(named.transform, x_i));
  const double top = *std::max_element(z.begin(), z.end());
  const double ceiling = named.transform.softcap == 0.0 ? kInfinity : named.transform.softcap;
  const auto above = [&](double by) {
    // A z from elsewhere in the row. It must not exceed the cap or the range of the dtype.
    const double base = top == -kInfinity ? 0.0 : top;
    const Scalar hint = static_cast<Scalar>(std::min(base + by, ceiling));
    return std::isinf(hint) ? base : static_cast<double>(hint);
  };
  double sum_max = kNaN;
  Sum expected{};
  // Some logit of the run, the largest, the least, -inf, and one from elsewhere in the row.
  for (const double hint : {z[z.size() / 2], top, *std::min_element(z.begin(), z.end()), -kInfinity,
                            above(3.0), above(40.0)}) {
    const double max = std::max(top, hint);
    const cpu::RunSum got = room.sum_exp(named.transform, x, hint, std::isnan(sum_max));
    if (max != sum_max) expected = expected_sum<T>(z, max);
    sum_max = max;
    require(got.max == max, "the maximum is exact", got.max, max);
    require(std::fabs(static_cast<long double>(got.sum) - expected.value) <= expected.slack,
            "sum of exps", got.sum, static_cast<double>(expected.value));
  }
}

template <typename T>
void check_sums(std::mt19937& random) {
  SumRoom<T> room;
  for (const Pattern& pattern : kPatterns) {
    std::vector<int64_t> all = sizes();
    // One block; two and a tail; several and an odd tail.
    for (const int64_t n : {int64_t{8192}, int64_t{16389}, kCapacity}) {
      if (n <= pattern.longest) all.push_back(n);
    }
    for (const int64_t n : all) {
      const std::vector<T> x = make_row<T>(pattern, n, random);
      for (const NamedTransform& named : kTransforms) {
        describe<T>(named, pattern.name, n);
        check_sum<T>(named, x, room);
      }
    }
  }
}

// A single term, so that no other term hides its error: over the whole range of float's exp, or
// down to the least normal number for float64.
template <typename T>
void check_single_terms(std::mt19937& random) {
  context = std::string(Named<T>::name) + ", a single term";
  constexpr bool is_double = std::is_same_v<T, double>;
  std::uniform_real_distribution<double> depth(is_double ? -708.0 : -87.0, 0.0);
  for (int i = 0; i < 20000; ++i) {
    const T x = from_double<T>(i % 2 ? depth(random) : depth(random) / 64);
    const cpu::RunSum sum = cpu::row_kernels().sum_exp(Named<T>::dtype, {1.0, 0.0}, &x, 1, 0.0);
    const Wide<T> distance = static_cast<Wide<T>>(widen(x)), expected = std::exp(distance);
    const Wide<T> tolerance = exp_error<T>(distance);
    require(std::fabs(Wide<T>(sum.sum) - expected) <= tolerance * expected, "exp of one logit",
            sum.sum, static_cast<double>(expected));
  }
}

// NaN and +inf at any place: in the first vector, in any step of the body, at the ends of a block
// and in the tail, with any label.
template <typename T>
void check_spoilt_sums(std::mt19937& random) {
  SumRoom<T> room;
  for (const NamedTransform& named : kTransforms) {
    for (const double spoiler : {kNaN, kInfinity}) {
      if (spoiler == kInfinity && named.transform.softcap != 0.0)
        continue;  // the cap makes it finite
      for (const Pattern& pattern : {kPatterns[0], kPatterns[6]}) {
        for (const int64_t n : {int64_t{1}, int64_t{37}, int64_t{300}, int64_t{8192 + 77}}) {
          describe<T>(named, spoiler == kInfinity ? "with +inf" : "with NaN", n);
          const std::vector<T> x = make_row<T>(pattern, n, random);
          std::vector<int64_t> positions;
          if (n <= 300) {
            for (int64_t i = 0; i < n; ++i) positions.push_back(i);
          } else {
            positions = {0, 70, 1023, 1024, 4095, 8191, 8192, 8255, n - 1};
          }
          for (const int64_t position : positions) {
            std::vector<T> spoilt = x;
            spoilt[static_cast<size_t>(position)] = from_double<T>(spoiler);
            const double other = z_of(named.transform, x[0]);
            for (const double hint : {other, -kInfinity, 1.0, spoiler}) {
              // Without the memory guards, because three runs each would take too long.
              const cpu::RunSum sum = cpu::row_kernels().sum_exp(Named<T>::dtype, named.transform,
                                                                 spoilt.data(), n, hint);
              require(std::isnan(sum.sum), "a sum with NaN or +inf is NaN", sum.sum);
            }
          }
        }
      }
    }
  }
}

}  // namespace

void check_row_sums() {
  std::mt19937 random(1);
  for_each_dtype([&](auto element) {
    using T = decltype(element);
    check_z<T>(random);
    check_sums<T>(random);
    check_single_terms<T>(random);
    check_spoilt_sums<T>(random);
  });
  context.clear();
}

}  // namespace simpo_ext::test
