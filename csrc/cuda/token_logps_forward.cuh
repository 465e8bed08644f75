// The forward of token_logps. token_logps.cuh has its memory contract.
#pragma once

#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/dtypes.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rounded.h"
#include "cuda/row_report.cuh"
#include "cuda/rows.h"
#include "cuda/token_logps.cuh"
#include "cuda/warp.h"

namespace simpo_ext::cuda {

// The number of threads that must fit on a multiprocessor. This limits a kernel to 48 or 64
// registers, or to 128 for the exp of a double, which is enough to spill none.
template <class Logits>
constexpr int kForwardThreadsPerSM = sizeof(typename Logits::ScalarType) == 8 ? 512
                                     : Logits::kIsCapped                      ? 1024
                                                                              : 1280;
template <class Logits>
constexpr int kReportThreadsPerSM = sizeof(typename Logits::ScalarType) == 8 ? 512 : 1024;

// LogSumExp::raise_max with the kernels' exp.
template <typename Scalar>
SIMPO_DEVICE void raise_max(LogSumExp<Scalar>& sum, Scalar new_max) {
  if (new_max > sum.max) {
    sum.sum *= static_cast<double>(fast_exp(sum.max - new_max));
    sum.max = new_max;
  }
}

// Rescales the lanes' sums to their common maximum, and adds them up.
template <typename Scalar>
SIMPO_DEVICE LogSumExp<Scalar> reduce_warp_of_sums(const LogSumExp<Scalar>& mine) {
  LogSumExp<Scalar> result;
  result.max = reduce_warp(mine.max, [](Scalar a, Scalar b) { return larger(a, b); });
  const Scalar scale = fast_exp(mine.max - result.reference());
  result.sum =
      reduce_warp(mine.sum * static_cast<double>(scale), [](double a, double b) { return a + b; });
  return result;
}

// Merges the threads' sums. Only thread 0 gets the result. Calls alternate between two sets of
// shared memory: while warp 0 reads one, the other warps go on and write the other. They cannot
// write the first again before warp 0 has read it, because they wait for warp 0 at the next call's
// barrier.
template <typename Scalar, int kThreads>
SIMPO_DEVICE LogSumExp<Scalar> reduce_block(const LogSumExp<Scalar>& mine, int call) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize);
  SIMPO_SHARED(Scalar, all_maxima, 2 * kWarps);
  SIMPO_SHARED(double, all_sums, 2 * kWarps);
  Scalar* warp_maxima = all_maxima + call % 2 * kWarps;
  double* warp_sums = all_sums + call % 2 * kWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  const LogSumExp<Scalar> of_my_warp = reduce_warp_of_sums(mine);
  if (lane == 0) {
    warp_maxima[warp] = of_my_warp.max;
    warp_sums[warp] = of_my_warp.sum;
  }
  __syncthreads();

  LogSumExp<Scalar> of_block;
  if (warp == 0) {
    if (lane < kWarps) of_block = {warp_maxima[lane], warp_sums[lane]};
    of_block = reduce_warp_of_sums(of_block);
  }
  return of_block;
}

// Adds kUnroll vectors: first, first + kThreads, ...; with kGuarded, only those that exist. All
// loads come before the first use, so that they are in flight together. The terms of these vectors
// are added up in Scalar, and the sums of all batches in double: if one label has nearly all the
// probability, its term is so large that small terms added to it in Scalar would lose their last
// digits.
template <typename T, class Logits, int kThreads, int kUnroll, bool kGuarded, bool kReports>
SIMPO_DEVICE void add_vectors(const Vector16* vectors, int first, int num_vectors,
                              const Logits& logits, LogSumExp<Compute<T>>& sum, RowReport& report) {
  using Scalar = Compute<T>;
  constexpr int kWidth = Elements<T>::kWidth;
  Vector16 v[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int i = first + u * kThreads;
    v[u] = !kGuarded || i < num_vectors ? load_streaming(vectors + i) : minus_infinities<T>();
  }
  Vector16 maxima = v[0];
  SIMPO_UNROLL
  for (int u = 1; u < kUnroll; ++u) maxima = Elements<T>::larger(maxima, v[u]);
  const Scalar largest = transformed(logits, Elements<T>::largest(maxima));
  if constexpr (kReports) {
    if (largest > sum.max) move_report(report, sum, largest);
  }
  raise_max(sum, largest);

  const Scalar reference = sum.reference();
  Scalar terms[2] = {0, 0};  // two chains of additions, which overlap
  [[maybe_unused]] ReportTerms<Scalar> of_report;
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    if (kGuarded && first + u * kThreads >= num_vectors) break;
    SIMPO_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      const Scalar distance = transformed(logits, Elements<T>::get(v[u], k)) - reference;
      const Scalar term = fast_exp(distance);
      terms[k % 2] += term;
      if constexpr (kReports) of_report.add(k, distance, term);
    }
  }
  sum.add_terms(static_cast<double>(terms[0] + terms[1]));
  if constexpr (kReports) of_report.add_to(report, reference);
}

// Adds this thread's part of the columns x[0, n).
template <typename T, class Logits, int kThreads, int kUnroll, bool kReports>
SIMPO_DEVICE void add_columns(const T* x, int n, const Logits& logits, LogSumExp<Compute<T>>& sum,
                              RowReport& report) {
  using Scalar = Compute<T>;
  const RowCut<T, int> cut(x, n);
  const Vector16* vectors = cut.vectors(x);
  const int tid = static_cast<int>(threadIdx.x), num_vectors = cut.num_vectors();
  int i = tid;
  for (; i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {
    add_vectors<T, Logits, kThreads, kUnroll, false, kReports>(vectors, i, num_vectors, logits, sum,
                                                               report);
  }
  if (i < num_vectors) {
    add_vectors<T, Logits, kThreads, kUnroll - 1, true, kReports>(vectors, i, num_vectors, logits,
                                                                  sum, report);
  }
  static_assert(2 * (Elements<T>::kWidth - 1) <= kThreads);
  if (tid < cut.num_edges()) {
    const Scalar z = transformed(logits, Elements<T>::widen(load(x + cut.element_of_edge(tid))));
    if constexpr (kReports) {
      if (z > sum.max) move_report(report, sum, z);
    }
    raise_max(sum, z);
    const Scalar distance = z - sum.reference(), term = fast_exp(distance);
    sum.add_terms(static_cast<double>(term));
    if constexpr (kReports) {
      ReportTerms<Scalar> of_report;
      of_report.add(0, distance, term);
      of_report.add_to(report, sum.reference());
    }
  }
}

// Writes the values of a segment for merge_shards, which treats it like a shard.
template <typename Scalar>
SIMPO_DEVICE void write_segment(const TokenLogpsArgs& args, int segment, int64_t row,
                                const LogSumExp<Scalar>& sum, Scalar label_z) {
  const int64_t N = args.targets.B * args.targets.T;
  double* result = args.segments + 3 * segment * N + row;
  store(result, static_cast<double>(sum.max));
  store(result + N, sum.sum);
  store(result + 2 * N, static_cast<double>(label_z));
}

template <typename Scalar, class Segments>
SIMPO_DEVICE void write_segments_of_block(const TokenLogpsArgs& args, const Segments& segments,
                                          int64_t row, Scalar value) {
  for (int i = segments.begin_of_block(); i < segments.end_of_block(); ++i) {
    write_segment(args, i, row, LogSumExp<Scalar>{value, static_cast<double>(value)}, value);
  }
}

// A row is summed segment by segment, and the segments are merged in order, by one thread. So its
// bits are the same whether one block works on all segments or several share them.
template <typename T, class Logits, int kThreads, int kUnroll, bool kIsOneSegment, bool kReports>
__global__ void __launch_bounds__(kThreads, (kReports ? kReportThreadsPerSM<Logits>
                                                      : kForwardThreadsPerSM<Logits>) /
                                                kThreads)
    token_logps_kernel(TokenLogpsArgs args, Logits logits) {
  using Scalar = Compute<T>;
  const Targets& targets = args.targets;
  const int64_t row = row_of_block();
  if (row >= targets.B * targets.T) return;
  const Token token = token_of_row(row, targets.T);
  const bool is_part = args.label_z != nullptr;
  constexpr bool kMayBeShared = !kIsOneSegment && !kReports;
  const bool is_shared = kMayBeShared && args.segments != nullptr;
  const int64_t tid = threadIdx.x;
  const RowSegments<T, kIsOneSegment, kMayBeShared> segments(args.V);

  const int64_t label = uniform_label_at(targets, token);
  if (label == targets.ignore_index || !is_in_vocabulary(label, args.num_labels)) {
    const bool is_masked = label == targets.ignore_index;
    const Scalar nothing = is_masked ? Scalar(0) : std::numeric_limits<Scalar>::quiet_NaN();
    if (is_shared) {  // the kernel that merges segments handles masked rows
      if (!is_masked && tid == 0) write_segments_of_block(args, segments, row, nothing);
      return;
    }
    if (tid == 0) {
      store(static_cast<Scalar*>(is_part ? args.label_z : args.logps) + row, nothing);
      store(static_cast<Scalar*>(args.max) + row, nothing);
      store(args.sum_exp + row, static_cast<double>(nothing));
    }
    if constexpr (kReports) {
      report_unscored_row<T, Logits, kThreads, kUnroll>(args, logits, row, token, is_masked);
    }
    return;
  }

  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t);
  // Loaded first, so that it has arrived when the row is done. NaN marks a block without the label,
  // which takes no other register while columns are added.
  T label_x = Elements<T>::narrow(std::numeric_limits<Scalar>::quiet_NaN());
  // The LogSumExp and the RowReport of the row so far, for thread 0 only. They are in shared memory
  // because registers are scarce while columns are added.
  SIMPO_SHARED(Scalar, row_max, 1);
  SIMPO_SHARED(double, row_sums, 3);
  if (tid == 0) {
    const int64_t column = label - args.first_label - segments.first_column_of_block();
    if (is_in_vocabulary(column, segments.columns_of_block())) {
      label_x = load(x + segments.first_column_of_block() + column);
    }
    LogSumExp<Scalar> before;
    [[maybe_unused]] RowReport report_before;
    if (args.continues) {
      before = {load(static_cast<const Scalar*>(args.max) + row), load(args.sum_exp + row)};
      if constexpr (kReports) {
        report_before = {load(args.mean_logit + row), load(args.entropy + row)};
      }
    }
    row_max[0] = before.max;
    row_sums[0] = before.sum;
    row_sums[1] = report_before.sum_z;
    row_sums[2] = report_before.sum_exp_z;
  }

  const int end = segments.end_of_block();
  for (int segment = segments.begin_of_block(); segment < end; ++segment) {
    LogSumExp<Scalar> sum;
    [[maybe_unused]] RowReport report_of_mine;
    add_columns<T, Logits, kThreads, kUnroll, kReports>(
        x + segments.first_column(segment), segments.columns(segment), logits, sum, report_of_mine);
    const LogSumExp<Scalar> of_segment = reduce_block<Scalar, kThreads>(sum, segment);
    if constexpr (kReports) {
      const RowReport report_of_segment =
          reduce_block_of_reports<Scalar, kThreads>(sum, report_of_mine);
      if (tid == 0) {
        RowReport so_far{row_sums[1], row_sums[2]};
        so_far.merge(LogSumExp<Scalar>{row_max[0], row_sums[0]}, report_of_segment, of_segment);
        row_sums[1] = so_far.sum_z;
        row_sums[2] = so_far.sum_exp_z;
      }
    }
    if (tid == 0 && is_shared) {
      // The merge takes the label's z from any segment.
      const bool is_first = segment == segments.begin_of_block();
      write_segment(args, segment, row, of_segment,
                    is_first ? transformed(logits, Elements<T>::widen(label_x))
                             : std::numeric_limits<Scalar>::quiet_NaN());
    } else if (tid == 0) {
      LogSumExp<Scalar> so_far{row_max[0], row_sums[0]};
      so_far.merge(of_segment);
      row_max[0] = so_far.max;
      row_sums[0] = so_far.sum;
    }
  }
  if (tid != 0 || is_shared) return;

  const LogSumExp<Scalar> of_row{row_max[0], row_sums[0]};
  const Scalar label_z = transformed(logits, Elements<T>::widen(label_x));
  if (!is_part) {
    store(static_cast<Scalar*>(args.logps) + row,
          static_cast<Scalar>(of_row.log_probability(label_z)));
  } else if (label_z == label_z || !args.continues) {
    store(static_cast<Scalar*>(args.label_z) + row, label_z);
  }
  store(static_cast<Scalar*>(args.max) + row, of_row.max);
  store(args.sum_exp + row, of_row.sum);
  if constexpr (kReports) {
    const RowReport report{row_sums[1], row_sums[2]};
    store(args.mean_logit + row,
          is_part ? report.sum_z : report.sum_z / static_cast<double>(args.V));
    store(args.entropy + row, is_part ? report.sum_exp_z : report.entropy(of_row.sum));
  }
}

// ---- launches: 0 or an error code -----------------------------------------------------------

template <typename T, class Logits, int kThreads, int kUnroll, bool kIsOneSegment, bool kReports>
int launch_token_logps(const TokenLogpsArgs& args, Stream stream) {
  const int64_t N = args.targets.B * args.targets.T;
  const bool is_shared = !kIsOneSegment && !kReports && args.segments != nullptr;
  const unsigned blocks = is_shared ? blocks_per_row(N, num_segments<T>(args.V)) : 1;
  return launch(token_logps_kernel<T, Logits, kThreads, kUnroll, kIsOneSegment, kReports>,
                grid_of_rows(N, blocks), dim3(kThreads), stream, args, Logits(args.transform));
}

// token_logps with a report, for a batch that is not empty. It has many kernels, and so its own
// source file.
int token_logps_report(const TokenLogpsArgs& args, Stream stream);

// Launches the kernel for a batch that is not empty.
template <bool kReports>
int dispatch_token_logps(const TokenLogpsArgs& args, Stream stream) {
  int error = 0;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    using T = typename decltype(element)::type;
    using Logits = typename decltype(logits)::type;
    constexpr int kUnroll = kVectorsInFlight<T, Logits>;
    static_assert(kLargeRowBytes<T, Logits> <= kSegmentBytes);
    if (is_large_row<T, Logits>(args.V)) {
      error = launch_token_logps<T, Logits, kLargeBlock, kUnroll, false, kReports>(args, stream);
    } else {
      error = launch_token_logps<T, Logits, kSmallBlock, kUnroll, true, kReports>(args, stream);
    }
  });
  return error;
}

}  // namespace simpo_ext::cuda
