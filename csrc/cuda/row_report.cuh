// The report of a row. A block of threads computes it from the same loads as the log-sum-exp.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/kernels.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rounded.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace simpo_ext::cuda {

// Moves a report to a new reference, with the kernels' exp. Call before the sum gets that
// reference.
template <typename Scalar>
SIMPO_DEVICE void move_report(RowReport& report, const LogSumExp<Scalar>& sum, Scalar reference) {
  const Scalar distance = sum.max - reference;
  const double scale = static_cast<double>(fast_exp(distance));
  // The distance is infinite if the sum is empty.
  report.sum_exp_z =
      scale == 0.0 ? 0.0 : scale * (report.sum_exp_z + static_cast<double>(distance) * sum.sum);
}

// The terms of a batch of values with the same reference, in Scalar.
template <typename Scalar>
struct ReportTerms {
  int count = 0;
  Scalar distances[2] = {0, 0}, products[2] = {0, 0};

  // distance = z - reference, term = exp(distance).
  SIMPO_DEVICE void add(int k, Scalar distance, Scalar term) {
    ++count;
    distances[k % 2] += distance;
    // For a distance of -inf, term is 0, and 0 times a finite distance stays 0.
    products[k % 2] += term * larger(std::numeric_limits<Scalar>::lowest(), distance);
  }

  SIMPO_DEVICE void add_to(RowReport& report, Scalar reference) const {
    report.sum_z += static_cast<double>(count) * static_cast<double>(reference) +
                    static_cast<double>(distances[0] + distances[1]);
    report.sum_exp_z += static_cast<double>(products[0] + products[1]);
  }
};

// Merges the sums and the reports of all lanes.
template <typename Scalar>
SIMPO_DEVICE void reduce_warp_of_reports(LogSumExp<Scalar>& sum, RowReport& report) {
  const auto add = [](double a, double b) { return a + b; };
  LogSumExp<Scalar> of_warp;
  of_warp.max = reduce_warp(sum.max, [](Scalar a, Scalar b) { return larger(a, b); });
  const Scalar reference = of_warp.reference();
  move_report(report, sum, reference);
  const double scale = static_cast<double>(fast_exp(sum.max - reference));
  of_warp.sum = reduce_warp(sum.sum * scale, add);
  report.sum_z = reduce_warp(report.sum_z, add);
  report.sum_exp_z = reduce_warp(report.sum_exp_z, add);
  sum = of_warp;
}

// Merges the reports of all threads, in thread 0. sum is the LogSumExp of the thread's values.
template <typename Scalar, int kThreads>
SIMPO_DEVICE RowReport reduce_block_of_reports(LogSumExp<Scalar> sum, RowReport report) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize);
  SIMPO_SHARED(Scalar, report_maxima, kWarps);
  SIMPO_SHARED(double, report_sums, 3 * kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  reduce_warp_of_reports(sum, report);
  if (lane == 0) {
    report_maxima[warp] = sum.max;
    report_sums[3 * warp] = sum.sum;
    report_sums[3 * warp + 1] = report.sum_z;
    report_sums[3 * warp + 2] = report.sum_exp_z;
  }
  __syncthreads();

  if (warp == 0) {
    sum = {};
    report = {};
    if (lane < kWarps) {
      sum = {report_maxima[lane], report_sums[3 * lane]};
      report = {report_sums[3 * lane + 1], report_sums[3 * lane + 2]};
    }
    reduce_warp_of_reports(sum, report);
  }
  return report;
}

// The sum of z over vectors first, first + kThreads, ... of a row, like add_vectors.
template <typename T, class Logits, int kThreads, int kUnroll, bool kGuarded>
SIMPO_DEVICE double sum_z_of_vectors(const Vector16* vectors, int64_t first, int64_t num_vectors,
                                     const Logits& logits) {
  Vector16 v[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    v[u] = !kGuarded || i < num_vectors ? load_streaming(vectors + i) : Vector16{};
  }
  Compute<T> sums[2] = {0, 0};
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    if (kGuarded && first + u * kThreads >= num_vectors) break;
    SIMPO_UNROLL
    for (int k = 0; k < Elements<T>::kWidth; ++k) {
      sums[k % 2] += transformed(logits, Elements<T>::get(v[u], k));
    }
  }
  return static_cast<double>(sums[0] + sums[1]);
}

// This thread's part of the sum of a row's z.
template <typename T, class Logits, int kThreads, int kUnroll>
SIMPO_DEVICE double sum_z_of_row(const T* x, int64_t V, const Logits& logits) {
  const RowCut<T> cut(x, V);
  const Vector16* vectors = cut.vectors(x);
  const int64_t num_vectors = cut.num_vectors(), tid = threadIdx.x;
  double sum = 0.0;
  int64_t i = tid;
  for (; i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {
    sum += sum_z_of_vectors<T, Logits, kThreads, kUnroll, false>(vectors, i, num_vectors, logits);
  }
  if (i < num_vectors) {
    sum +=
        sum_z_of_vectors<T, Logits, kThreads, kUnroll - 1, true>(vectors, i, num_vectors, logits);
  }
  if (tid < cut.num_edges()) {
    sum += static_cast<double>(
        transformed(logits, Elements<T>::widen(load(x + cut.element_of_edge(tid)))));
  }
  return sum;
}

// The report of a row that is masked or whose label is out of range: 0 or NaN, like its
// log-probability. With all_positions, a masked row has its mean_logit.
template <typename T, class Logits, int kThreads, int kUnroll>
SIMPO_DEVICE void report_unscored_row(const TokenLogpsArgs& args, const Logits& logits, int64_t row,
                                      Token token, bool is_masked) {
  using Scalar = Compute<T>;
  const bool is_first_thread = threadIdx.x == 0;
  const double nothing = is_masked ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  if (is_first_thread) store(args.entropy + row, nothing);
  if (!is_masked || !args.all_positions) {
    if (is_first_thread) store(args.mean_logit + row, nothing);
    return;
  }
  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t);
  RowReport report;
  report.sum_z = sum_z_of_row<T, Logits, kThreads, kUnroll>(x, args.V, logits);
  report = reduce_block_of_reports<Scalar, kThreads>({}, report);
  if (!is_first_thread) return;
  if (args.continues) report.sum_z += load(args.mean_logit + row);
  const bool is_part = args.label_z != nullptr;
  store(args.mean_logit + row, is_part ? report.sum_z : report.sum_z / static_cast<double>(args.V));
}

}  // namespace simpo_ext::cuda
