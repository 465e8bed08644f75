// scaled_exp of the current instruction set, compared with plain computations in double, or in long
// double for float64.

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

template <typename T>
struct ScaledRoom {
  Fence<T> in{kCapacity}, out{kCapacity};

  enum Way { kApart, kStreaming, kInPlace };

  // start < 0: at the end of the space.
  std::vector<T> scaled_exp(const LogitTransform& transform, const std::vector<T>& x, double max,
                            double factor, Way way, int64_t start = -1, int64_t out_start = -1) {
    const int64_t n = static_cast<int64_t>(x.size());
    T* run = start < 0 ? in.place_last(n) : in.place(start, n);
    std::memcpy(run, x.data(), x.size() * sizeof(T));
    T* dx = run;
    if (way != kInPlace) {
      dx = out_start < 0 ? out.place_last(n) : out.place(out_start, n);
      std::memset(static_cast<void*>(dx), 0x77, x.size() * sizeof(T));
    }
    cpu::row_kernels().scaled_exp(Named<T>::dtype, transform, run, n, max, factor, dx,
                                  way == kStreaming);
    std::vector<T> result(dx, dx + n);
    if (way != kInPlace) {
      require(std::memcmp(run, x.data(), x.size() * sizeof(T)) == 0, "x is not written");
      out.require_untouched();
    }
    in.require_untouched();
    return result;
  }
};

template <typename T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// For float32 and float64. Results of two bytes are those of float32, narrowed.
template <typename T>
void check_scaled_values(const LogitTransform& transform, const std::vector<T>& x, double max,
                         double factor, const std::vector<T>& dx) {
  const T exact_factor = static_cast<T>(factor);
  const double flushed =
      static_cast<double>(std::numeric_limits<T>::min()) * std::max(1.0, std::fabs(factor));
  for (size_t i = 0; i < x.size(); ++i) {
    const double z = z_of(transform, x[i]), got = static_cast<double>(dx[i]);
    const Wide<T> distance = Wide<T>(z) - Wide<T>(max);
    const Wide<T> unscaled = std::fabs(Wide<T>(exact_factor)) * std::exp(distance);
    Wide<T> slope = 1, slope_error = 0;
    if (transform.softcap != 0.0) {
      const Wide<T> ratio = Wide<T>(z) / Wide<T>(transform.softcap);
      slope = (1 - ratio) * (1 + ratio);
      // z / softcap is off by an ulp, or up to two ulps after the product with 1 + ratio. Each of
      // three products is rounded, too.
      slope_error = Wide<T>(kEpsilon<T>) * (Wide<T>(2) + Wide<T>(1.5) * slope);
    }
    // The error of the difference in the compute dtype, if it is not exact.
    const Wide<T> rounding =
        std::isinf(z) ? Wide<T>(0)
                      : std::fabs(Wide<T>(static_cast<T>(z) - static_cast<T>(max)) - distance);
    const Wide<T> tolerance = exp_error<T>(distance) + (rounding < 1 ? rounding : Wide<T>(1));
    const Wide<T> expected = (exact_factor < 0 ? -unscaled : unscaled) * slope;
    if (z == -kInfinity) {
      require(got == 0.0, "exp(-inf) is 0", got);
    } else if (z == max && transform.softcap == 0.0) {
      require(got == static_cast<double>(exact_factor), "exp(0) is 1", got, factor);
    } else if (unscaled == 0) {
      require(std::fabs(got) <= flushed, "exp of far below is 0", got);
    } else {
      const Wide<T> slack = unscaled * (tolerance * slope + slope_error) + Wide<T>(flushed);
      require(std::fabs(Wide<T>(got) - expected) <= slack, "scaled exp", got,
              static_cast<double>(expected));
    }
  }
}

template <typename T>
void check_narrowed_values(const LogitTransform& transform, const std::vector<T>& x, double max,
                           double factor, const std::vector<T>& dx) {
  std::vector<float> wide, wide_dx(x.size());
  for (const T x_i : x) wide.push_back(widen(x_i));
  cpu::row_kernels().scaled_exp(DType::kFloat32, transform, wide.data(),
                                static_cast<int64_t>(x.size()), max, factor, wide_dx.data(), false);
  for (size_t i = 0; i < x.size(); ++i) {
    require(same_bits(z_of(transform, x[i]), z_of(transform, wide[i])), "z is float32's");
    const uint16_t expected = narrow<T>(wide_dx[i]).bits, got = dx[i].bits;
    if (std::isnan(wide_dx[i])) {
      require(std::isnan(widen(dx[i])), "NaN stays NaN");
    } else if (std::is_same_v<T, BFloat16> && std::fabs(wide_dx[i]) < 0x1p-126f) {
      // The conversion instruction treats subnormal numbers as 0.
      require(got == expected || (got & 0x7fffu) == 0, "narrowed or 0", got, expected);
    } else {
      require(got == expected, "float32's result, narrowed", got, expected);
    }
  }
}

template <typename T>
void check_scaled(const NamedTransform& named, const std::vector<T>& x, double max, double factor,
                  ScaledRoom<T>& room) {
  using Room = ScaledRoom<T>;
  const std::vector<T> dx = room.scaled_exp(named.transform, x, max, factor, Room::kApart);
  if constexpr (sizeof(T) == 2) {
    check_narrowed_values<T>(named.transform, x, max, factor, dx);
  } else {
    check_scaled_values<T>(named.transform, x, max, factor, dx);
  }
  const auto check_way = [&](typename Room::Way way, int64_t start, int64_t out_start) {
    require(equal_bits(room.scaled_exp(named.transform, x, max, factor, way, start, out_start), dx),
            "the way it is written does not show", static_cast<double>(start),
            static_cast<double>(out_start));
  };
  check_way(Room::kInPlace, 1, -1);
  check_way(Room::kStreaming, 0, 1);
  if (x.size() > 300) return;  // a long run only differs from a short one in its length
  check_way(Room::kInPlace, -1, -1);
  check_way(Room::kStreaming, -1, -1);
  check_way(Room::kApart, 1, 0);
}

template <typename T>
void check_scaled_runs(std::mt19937& random) {
  ScaledRoom<T> room;
  const double factors[] = {1.0, -0.37, 3e4, -1e-6};
  for (const Pattern& pattern : kPatterns) {
    for (const int64_t n : sizes()) {
      const std::vector<T> x = make_row<T>(pattern, n, random);
      for (const NamedTransform& named : kTransforms) {
        describe<T>(named, pattern.name, n);
        double max = -kInfinity;
        for (const T x_i : x) max = std::max(max, z_of(named.transform, x_i));
        if (max == -kInfinity) continue;  // then the factor is not finite
        // Sometimes the largest logit of the row is elsewhere.
        if (n % 5 == 0 && named.transform.softcap == 0.0) max += std::fabs(max) < 1e4 ? 2.5 : 0.0;
        max = static_cast<double>(static_cast<Compute<T>>(max));
        check_scaled<T>(named, x, max, factors[n % 4], room);
      }
    }
  }
  // The whole range of exp.
  for (const NamedTransform& named : kTransforms) {
    describe<T>(named, "all depths", 20011);
    const double depth = std::is_same_v<T, double> ? 750.0 : 110.0;
    std::vector<T> x;
    for (int i = 0; i < 20011; ++i) x.push_back(from_double<T>(-depth * i / 20010 + 0.25));
    check_scaled<T>(named, x, z_of(named.transform, x[0]), -1.0, room);
  }
}

// The result of an element depends neither on alignment nor on its place: in a vector of the body,
// before the first aligned one, or in the tail. 64 bytes are the widest vector.
template <typename T>
void check_places(std::mt19937& random) {
  using Room = ScaledRoom<T>;
  ScaledRoom<T> room;
  constexpr int64_t kStarts = 64 / sizeof(T);
  for (const NamedTransform& named : kTransforms) {
    for (const int64_t n : {int64_t{1}, int64_t{3}, kStarts - 1, kStarts, kStarts + 1, int64_t{77},
                            3 * kStarts + 1, int64_t{300}}) {
      describe<T>(named, "places", n);
      std::vector<T> x = make_row<T>(kPatterns[0], n, random);
      x[static_cast<size_t>(n / 2)] = from_double<T>(-kInfinity);
      x[static_cast<size_t>(n / 3)] = from_double<T>(-95.0);  // float's exp is subnormal there
      const double max = 20.0, factor = -0.37;
      std::vector<T> dx;
      for (const T x_i : x) {
        dx.push_back(room.scaled_exp(named.transform, {x_i}, max, factor, Room::kApart)[0]);
      }
      for (int64_t start = 0; start < kStarts; ++start) {
        const int64_t other = (start * 5 + 3) % kStarts;
        for (const auto way : {Room::kApart, Room::kStreaming, Room::kInPlace}) {
          require(
              equal_bits(room.scaled_exp(named.transform, x, max, factor, way, start, start), dx),
              "the same as each element by itself", static_cast<double>(start));
          require(
              equal_bits(room.scaled_exp(named.transform, x, max, factor, way, other, start), dx),
              "the same as each element by itself", static_cast<double>(other),
              static_cast<double>(start));
        }
      }
    }
  }
}

// Inputs whose results must be NaN, at every place of a run with a body and a tail.
template <typename T>
void check_spoilt_runs() {
  using Room = ScaledRoom<T>;
  ScaledRoom<T> room;
  constexpr int64_t kLength = 141;
  const std::vector<T> ordinary(kLength, from_double<T>(0.5)),
      nothing(kLength, from_double<T>(-kInfinity));
  const auto require_nan = [](const std::vector<T>& dx, const char* what) {
    for (const T dx_i : dx) require(std::isnan(widen(dx_i)), what, to_double(dx_i));
  };
  for (const NamedTransform& named : kTransforms) {
    describe<T>(named, "NaN", kLength);
    const bool is_capped = named.transform.softcap != 0.0;
    for (const auto way : {Room::kApart, Room::kStreaming, Room::kInPlace}) {
      for (int64_t i = 0; i < kLength; ++i) {
        const size_t place = static_cast<size_t>(i);
        std::vector<T> x = ordinary;
        x[place] = from_double<T>(-kInfinity);
        const std::vector<T> gap = room.scaled_exp(named.transform, x, 5.0, -2.0, way);
        require(is_capped || to_double(gap[place]) == 0.0, "exp(-inf) is 0", to_double(gap[place]));
        require_nan(room.scaled_exp(named.transform, x, 5.0, kNaN, way), "a factor of NaN");
        x[place] = from_double<T>(kNaN);
        const std::vector<T> dx = room.scaled_exp(named.transform, x, 5.0, -2.0, way);
        for (size_t j = 0; j < dx.size(); ++j) {
          require(std::isnan(widen(dx[j])) == (j == place), "NaN stays where it is",
                  static_cast<double>(j), static_cast<double>(place));
        }
        if (is_capped) continue;
        x[place] = from_double<T>(kInfinity);
        require(std::isnan(widen(room.scaled_exp(named.transform, x, kInfinity, -2.0, way)[place])),
                "inf - inf");
      }
      if (is_capped) continue;
      // For a row without a finite logit, the sum is 0 and the factor is the result of a division
      // by 0.
      for (const double factor : {kInfinity, -kInfinity}) {
        require_nan(room.scaled_exp(named.transform, nothing, -kInfinity, factor, way),
                    "all -inf, with an infinite factor");
      }
    }
  }
}

}  // namespace

void check_row_gradients() {
  std::mt19937 random(1);
  for_each_dtype([&](auto element) {
    using T = decltype(element);
    check_scaled_runs<T>(random);
    check_places<T>(random);
    check_spoilt_runs<T>();
  });
  context.clear();
}

}  // namespace simpo_ext::test
