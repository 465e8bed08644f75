// sum_exp_report and sum_z of the current instruction set. The sum has the same bits as that of
// sum_exp. The report's sums are compared with plain computations in double, or in long double for
// float64.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/row_kernels.h"
#include "fence.h"
#include "rows.h"

namespace simpo_ext::test {
namespace {

struct Expected {
  long double value, slack;
};

// The distances from some z, with a few roundings each. In float64 their sum is not compensated.
template <typename T>
Expected expected_sum_z(const std::vector<double>& z, double largest) {
  Expected expected{0, 0};
  for (const double z_i : z) {
    expected.value += z_i;
    expected.slack += 64 * kEpsilon<T> * (std::fabs(z_i) + std::fabs(largest));
  }
  return expected;
}

template <typename T>
Expected expected_sum_exp_z(const std::vector<double>& z, double max) {
  Expected expected{0, 0};
  for (const double z_i : z) {
    if (z_i == -kInfinity) continue;
    const Wide<T> distance = Wide<T>(z_i) - Wide<T>(max), term = std::exp(distance);
    if (term == 0) continue;
    expected.value += term * distance;
    // The pass may use another reference, up to 8 away.
    const Wide<T> far = 9 + std::fabs(distance);
    expected.slack += term * far * (8 + far) * Wide<T>(2 * kEpsilon<T>);
    expected.slack += 1000 * std::numeric_limits<Compute<T>>::min();
  }
  return expected;
}

bool is_within(double got, const Expected& expected) {
  return got == static_cast<double>(expected.value) ||
         std::fabs(static_cast<long double>(got) - expected.value) <= expected.slack;
}

// The sum of a few such logits exceeds the range of the compute dtype.
template <typename T>
bool may_overflow(const std::vector<double>& z) {
  const double limit = static_cast<double>(std::numeric_limits<Compute<T>>::max()) / 1024;
  return std::any_of(z.begin(), z.end(), [&](double z_i) { return std::fabs(z_i) > limit; });
}

template <typename T>
void check_row(const NamedTransform& named, const std::vector<T>& x, Fence<T>& fence) {
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<double> z;
  for (const T x_i : x) z.push_back(z_of(named.transform, x_i));
  const double top = *std::max_element(z.begin(), z.end());
  const cpu::RowKernels& kernels = cpu::row_kernels();
  T* run = fence.place_last(n);
  std::memcpy(run, x.data(), x.size() * sizeof(T));

  const auto require_sum_z = [&](double got) {
    if (may_overflow<T>(z)) return;
    // The sum of -inf and finite z is -inf.
    const Expected expected = expected_sum_z<T>(z, std::isinf(top) ? 0.0 : top);
    require(is_within(got, expected), "sum of z", got, static_cast<double>(expected.value));
  };
  require_sum_z(kernels.sum_z(Named<T>::dtype, named.transform, run, n));
  for (const double hint : {z[z.size() / 2], top, -kInfinity}) {
    const cpu::RunSum sum = kernels.sum_exp(Named<T>::dtype, named.transform, run, n, hint);
    const cpu::RunReport got =
        kernels.sum_exp_report(Named<T>::dtype, named.transform, run, n, hint);
    require(same_bits(got.sum.max, sum.max) && same_bits(got.sum.sum, sum.sum),
            "a report leaves the sum as it is", got.sum.sum, sum.sum);
    require_sum_z(got.report.sum_z);
    const Expected expected = expected_sum_exp_z<T>(z, top);
    require(is_within(got.report.sum_exp_z, expected), "sum of exps times distances",
            got.report.sum_exp_z, static_cast<double>(expected.value));
    if (n > 300) break;
  }
}

// NaN and +inf, in the body of a run and in its tail.
template <typename T>
void check_spoilt(std::mt19937& random) {
  const cpu::RowKernels& kernels = cpu::row_kernels();
  for (const double spoiler : {kNaN, kInfinity}) {
    for (const int64_t n : {int64_t{1}, int64_t{37}, int64_t{8192 + 77}}) {
      describe<T>(kTransforms[0], "spoilt", n);
      for (const int64_t position : {int64_t{0}, n / 2, n - 1}) {
        std::vector<T> x = make_row<T>(kPatterns[0], n, random);
        x[static_cast<size_t>(position)] = from_double<T>(spoiler);
        const LogitTransform plain = kTransforms[0].transform;
        const cpu::RunReport got = kernels.sum_exp_report(Named<T>::dtype, plain, x.data(), n, 1.0);
        require(!std::isfinite(got.report.sum_z), "sum of z with NaN or +inf", got.report.sum_z);
        require(std::isnan(got.report.entropy(got.sum.sum)), "entropy with NaN or +inf");
        const double sum = kernels.sum_z(Named<T>::dtype, plain, x.data(), n);
        require(!std::isfinite(sum) && sum != -kInfinity, "sum of z with NaN or +inf", sum);
      }
    }
  }
}

template <typename T>
void check_rows(std::mt19937& random) {
  Fence<T> fence(kCapacity);
  for (const Pattern& pattern : kPatterns) {
    // Only a tail; a step and less; sums of several lanes' batches; two blocks that are summed
    // again.
    for (const int64_t n : {1, 2, 7, 16, 33, 64, 70, 129, 257, 2050, 8193, 16389}) {
      if (n > std::max<int64_t>(pattern.longest, 300)) continue;
      const std::vector<T> x = make_row<T>(pattern, n, random);
      for (const NamedTransform& named : kTransforms) {
        describe<T>(named, pattern.name, n);
        check_row<T>(named, x, fence);
      }
    }
  }
}

}  // namespace

void check_row_reports() {
  std::mt19937 random(2);
  for_each_dtype([&](auto element) {
    using T = decltype(element);
    check_rows<T>(random);
    check_spoilt<T>(random);
  });
  context.clear();
}

}  // namespace simpo_ext::test
