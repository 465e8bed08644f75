// The passes over a row, with the vectors of one instruction set. Each row_kernels_*.cpp defines
// SIMPO_ISA, includes one simd_*.h and then this file.
//
// Memory contract: a forward pass reads each logit once and keeps only sums, in registers. A
// backward pass reads each logit once and writes its gradient. The result of an element depends
// neither on its alignment nor on its lane in a vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cpu/lane_sums.h"
#include "cpu/row_kernels.h"
#include "cpu/vector_math.h"

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

// After each block of this many logits, the pass checks whether the reference that it subtracts is
// still close enough. A block fits the second-level cache, in case the pass sums it again.
constexpr int64_t kBlock = 8192;
// The first reference is the maximum of this many logits.
constexpr int64_t kFirstLook = 256;
// How far a logit may lie above the reference. Up to here, exp of the difference is as accurate as
// for negative differences.
constexpr double kSlack = 8.0;
constexpr int64_t kPrefetchBytes = 8192;

template <typename T>
constexpr int64_t kStep = 2 * kPairsPerStep * Vec<Compute<T>>::kSize;

template <typename T>
void prefetch_step(const T* x) {
  for (int64_t byte = 0; byte < kStep<T> * int64_t{sizeof(T)}; byte += 64) {
    prefetch(reinterpret_cast<const char*>(x) + kPrefetchBytes + byte);
  }
}

template <typename Scalar>
struct BlockSum {
  double sum;      // of exp(z - reference)
  Scalar largest;  // z, except NaN
};

// With kReports, writes report; otherwise it is null.
template <bool kReports, typename T, class Logits>
BlockSum<Compute<T>> sum_block(const T* x, int64_t n, const Logits& logits, Compute<T> reference,
                               RowReport* report) {
  using V = Vec<Compute<T>>;
  constexpr int kVectors = 2 * kPairsPerStep;
  const ScaledExp<Compute<T>> exp(Compute<T>(1));
  const V shift(reference);
  LaneSums<Compute<T>> sums[kVectors];
  V largest[kVectors];
  for (V& lanes : largest) lanes = V(-std::numeric_limits<Compute<T>>::infinity());
  [[maybe_unused]] BlockReport<Compute<T>> of_report;

  int64_t i = 0;
  while (i + kStep<T> <= n) {
    const int64_t end = std::min(i + kTermsPerLane * kStep<T>, n - n % kStep<T>);
    for (; i < end; i += kStep<T>) {
      prefetch_step(x + i);
      V z[kVectors];
      for (int k = 0; k < kVectors; k += 2) {
        load_pair_in_any_order(x + i + k * V::kSize, z[k], z[k + 1]);
      }
      SIMPO_EACH z[k] = logits.z(z[k]);
      SIMPO_EACH largest[k] = larger(z[k], largest[k]);
      SIMPO_EACH z[k] = z[k] - shift;
      [[maybe_unused]] V distances[kVectors];
      if constexpr (kReports) {
        SIMPO_EACH distances[k] = z[k];
      }
      exp.apply(z);
      SIMPO_EACH sums[k].add(z[k]);
      if constexpr (kReports) of_report.add(z, distances);
    }
    SIMPO_EACH sums[k].empty();
    if constexpr (kReports) of_report.empty();
  }
  for (; i < n; i += V::kSize) {
    const int64_t count = std::min(V::kSize, n - i);
    T padded[V::kSize];
    for (int64_t lane = 0; lane < V::kSize; ++lane) padded[lane] = x[lane < count ? i + lane : i];
    V z[1] = {logits.z(load(padded))};
    largest[0] = larger(z[0], largest[0]);
    z[0] = z[0] - shift;
    [[maybe_unused]] const V distances = z[0];
    exp.apply(z);
    sums[0].add(first_lanes(z[0], count));
    if constexpr (kReports) {
      of_report.add(first_lanes(z[0], count), first_lanes(distances, count));
    }
  }
  sums[0].empty();
  if constexpr (kReports) {
    of_report.empty();
    *report = of_report.report(n, reference);
  }
  V all = largest[0];
  for (int k = 1; k < kVectors; ++k) all = larger(all, largest[k]);
  return {LaneSums<Compute<T>>::total(sums), largest_lane(all)};
}

// The largest element that is not NaN.
template <typename T>
Compute<T> largest_of(const T* x, int64_t n) {
  using V = Vec<Compute<T>>;
  Compute<T> largest = -std::numeric_limits<Compute<T>>::infinity();
  int64_t i = 0;
  if (n >= V::kSize) {
    V lanes(largest);
    for (; i + V::kSize <= n; i += V::kSize) lanes = larger(load(x + i), lanes);
    largest = largest_lane(lanes);
  }
  for (; i < n; ++i) {
    const Compute<T> value = widen(x[i]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

// The z of one logit, computed in a vector, so that it is rounded as in the passes.
template <class Logits>
typename Logits::ScalarType first_z(const Logits& logits, typename Logits::ScalarType x) {
  using V = Vec<typename Logits::ScalarType>;
  return largest_lane(logits.z(V(x)));
}

// With kReports, adds to report; otherwise it is null.
template <bool kReports, typename T, class Logits>
RunSum sum_exp(const T* x, int64_t n, const Logits& logits, Compute<T> hint, RowReport* report) {
  using Scalar = Compute<T>;
  using Limits = std::numeric_limits<Scalar>;
  // The first reference is not -inf, because z - -inf is not finite. If a block has z far above the
  // reference, the loop below raises it.
  LogSumExp<Scalar> total{Limits::lowest(), 0.0};
  total.raise_max(hint);
  total.raise_max(first_z(logits, largest_of(x, std::min(n, kFirstLook))));
  const auto raise_max = [&](Scalar new_max) {
    if constexpr (kReports) report->raise_max(total, new_max);
    total.raise_max(new_max);
  };
  Scalar largest = hint;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = std::min(kBlock, n - i);
    [[maybe_unused]] RowReport of_block;
    RowReport* const block_report = kReports ? &of_block : nullptr;
    BlockSum<Scalar> block = sum_block<kReports>(x + i, length, logits, total.max, block_report);
    if (static_cast<double>(block.largest) > static_cast<double>(total.max) + kSlack) {
      raise_max(block.largest);
      block = sum_block<kReports>(x + i, length, logits, total.max, block_report);
    }
    total.add_terms(block.sum);
    if constexpr (kReports) {
      report->sum_z += of_block.sum_z;
      report->sum_exp_z += of_block.sum_exp_z;
    }
    largest = block.largest > largest ? block.largest : largest;
  }
  raise_max(largest);
  const bool is_empty = total.sum == 0.0 && largest == -Limits::infinity();
  return {static_cast<double>(is_empty ? largest : total.max), total.sum};
}

template <typename T, class Logits>
double sum_z(const T* x, int64_t n, const Logits& logits) {
  using Scalar = Compute<T>;
  using V = Vec<Scalar>;
  constexpr int kVectors = 2 * kPairsPerStep;
  // The first z is subtracted from all, so that a common offset of the logits costs no digits.
  const Scalar first = n == 0 ? Scalar(0) : first_z(logits, widen(x[0]));
  const Scalar reference = std::isfinite(first) ? first : Scalar(0);
  const V shift(reference);
  PlainLaneSums<Scalar> sums[kVectors];
  int64_t i = 0;
  while (i + kStep<T> <= n) {
    const int64_t end = std::min(i + kTermsPerLane * kStep<T>, n - n % kStep<T>);
    for (; i < end; i += kStep<T>) {
      prefetch_step(x + i);
      V z[kVectors];
      for (int k = 0; k < kVectors; k += 2) {
        load_pair_in_any_order(x + i + k * V::kSize, z[k], z[k + 1]);
      }
      SIMPO_EACH z[k] = logits.z(z[k]);
      SIMPO_EACH sums[k].add(z[k] - shift);
    }
    SIMPO_EACH sums[k].empty();
  }
  for (; i < n; i += V::kSize) {
    const int64_t count = std::min(V::kSize, n - i);
    T padded[V::kSize];
    for (int64_t lane = 0; lane < V::kSize; ++lane) padded[lane] = x[lane < count ? i + lane : i];
    sums[0].add(first_lanes(logits.z(load(padded)) - shift, count));
  }
  sums[0].empty();
  return static_cast<double>(n) * static_cast<double>(reference) +
         PlainLaneSums<Scalar>::total(sums);
}

template <bool kStreaming, typename T, class Logits>
void scaled_exp(const T* x, int64_t n, const Logits& logits, Compute<T> max, Compute<T> factor,
                T* dx) {
  using V = Vec<Compute<T>>;
  constexpr int kVectors = 2 * kPairsPerStep;
  const ScaledExp<Compute<T>> exp(factor);
  // With a NaN factor, all elements must become NaN. exp(-inf) gives 0 even then, so NaN is
  // subtracted from them.
  const V shift(factor == factor ? max : factor);
  const auto to_gradient = [&](V(&lanes)[kVectors]) {
    V slope[kVectors];
    SIMPO_EACH lanes[k] = logits.z(lanes[k]);
    SIMPO_EACH slope[k] = logits.own_slope(lanes[k]);
    SIMPO_EACH lanes[k] = lanes[k] - shift;
    exp.apply(lanes);
    SIMPO_EACH lanes[k] = lanes[k] * slope[k];
  };
  // The last elements, fewer than a step, go through a buffer, so that only they are accessed.
  const auto write_range = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t count = std::min(kStep<T>, end - begin);
      T buffer[kStep<T>] = {};
      std::copy_n(x + begin, count, buffer);
      V lanes[kVectors];
      SIMPO_EACH lanes[k] = load(buffer + k * V::kSize);
      to_gradient(lanes);
      for (int k = 0; k < kVectors; k += 2) {
        store_pair<false>(buffer + k * V::kSize, lanes[k], lanes[k + 1]);
      }
      std::copy_n(buffer, count, dx + begin);
      begin += count;
    }
  };
  int64_t i = 0;
  if constexpr (kStreaming) {
    const int64_t misaligned = reinterpret_cast<intptr_t>(dx) % kVectorBytes;
    const int64_t head = misaligned == 0 ? 0 : (kVectorBytes - misaligned) / int64_t{sizeof(T)};
    i = std::min(head, n);
    write_range(0, i);
  }
  for (; i + kStep<T> <= n; i += kStep<T>) {
    prefetch_step(x + i);
    V lanes[kVectors];
    SIMPO_EACH lanes[k] = load(x + i + k * V::kSize);
    to_gradient(lanes);
    for (int k = 0; k < kVectors; k += 2) {
      store_pair<kStreaming>(dx + i + k * V::kSize, lanes[k], lanes[k + 1]);
    }
  }
  write_range(i, n);
  if constexpr (kStreaming) finish_streaming();
}

// Calls function(x as T*, logits) with the types for this dtype and transform.
template <typename Function>
void dispatch(DType dtype, LogitTransform transform, const void* x, const Function& function) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using Scalar = Compute<T>;
    const T* elements = static_cast<const T*>(x);
    if (transform.softcap != 0.0) {
      function(elements, CappedLogits<Scalar>(transform));
    } else if (transform.logit_scale != 1.0) {
      function(elements, ScaledLogits<Scalar>(transform));
    } else {
      function(elements, PlainLogits<Scalar>(transform));
    }
  });
}

constexpr RowKernels make_row_kernels(const char* capability) {
  return {
      .capability = capability,
      .z =
          [](DType dtype, LogitTransform transform, const void* x) {
            double z = 0.0;
            dispatch(dtype, transform, x, [&](const auto* element, const auto& logits) {
              z = static_cast<double>(first_z(logits, widen(*element)));
            });
            return z;
          },
      .sum_exp =
          [](DType dtype, LogitTransform transform, const void* x, int64_t n, double hint) {
            RunSum sum{};
            dispatch(dtype, transform, x, [&]<typename T>(const T* row, const auto& logits) {
              sum = sum_exp<false>(row, n, logits, static_cast<Compute<T>>(hint), nullptr);
            });
            return sum;
          },
      .sum_exp_report =
          [](DType dtype, LogitTransform transform, const void* x, int64_t n, double hint) {
            RunReport run{};
            dispatch(dtype, transform, x, [&]<typename T>(const T* row, const auto& logits) {
              run.sum = sum_exp<true>(row, n, logits, static_cast<Compute<T>>(hint), &run.report);
            });
            return run;
          },
      .sum_z =
          [](DType dtype, LogitTransform transform, const void* x, int64_t n) {
            double sum = 0.0;
            dispatch(dtype, transform, x,
                     [&](const auto* row, const auto& logits) { sum = sum_z(row, n, logits); });
            return sum;
          },
      .scaled_exp =
          [](DType dtype, LogitTransform transform, const void* x, int64_t n, double max,
             double factor, void* dx, bool streaming) {
            dispatch(dtype, transform, x,
                     [&]<typename T, class Logits>(const T* row, const Logits& logits) {
                       const auto pass =
                           streaming ? scaled_exp<true, T, Logits> : scaled_exp<false, T, Logits>;
                       pass(row, n, logits, static_cast<Compute<T>>(max),
                            static_cast<Compute<T>>(factor), static_cast<T*>(dx));
                     });
          },
  };
}

}  // namespace

}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
