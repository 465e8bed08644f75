// Per-token log-probabilities on the GPU: a block of threads for each token row.
//
// Memory contract, per row of V logits of e bytes:
//
//   forward: a valid row is read once, and its label's logit again, (V + 1) e bytes; 16 bytes are
//   written, 24 for float64. A masked row costs one label load. A report adds 16 bytes written and,
//   of all positions, masked rows read once.
//
//   backward, also in place: a valid row is read and written once, and its label's logit again. A
//   masked row, or one whose incoming gradient is 0, is written (zeros), and its logits not read.
//
// Of a part of the vocabulary: the forward reads the label's logit only where the part has it, and
// the max and sum_exp of the parts before, if there are any; it writes what it was given, but the
// label's z only if the part has the label or is the first. The backward reads and writes the
// label's logit again, and writes its gradient, only where the part has it.
//
// No scratch. A label outside the vocabulary is not followed: its row becomes NaN.
//
// Every sum has a fixed order, so equal inputs at equal alignments give equal bits. Rows may start
// at any element; 16-byte accesses begin at the first aligned one.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/dtypes.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/row_report.cuh"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace simpo_ext::cuda {

// How many threads shall fit on a multiprocessor. The limit of registers that this sets, 40 or 64,
// is what each kernel needs without spills; exp of a double needs up to 128.
template <class Logits>
constexpr int kForwardThreadsPerSM = sizeof(typename Logits::ScalarType) == 8 ? 512
                                     : Logits::kIsCapped                      ? 1024
                                                                              : 1536;
template <class Logits>
constexpr int kReportThreadsPerSM = sizeof(typename Logits::ScalarType) == 8 ? 512 : 1024;
template <class Logits>
constexpr int kBackwardThreadsPerSM = sizeof(typename Logits::ScalarType) == 8 ? 512 : 1024;

// ---- forward --------------------------------------------------------------------------------

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

// The threads' sums together, in thread 0.
template <typename Scalar, int kThreads>
SIMPO_DEVICE LogSumExp<Scalar> reduce_block(const LogSumExp<Scalar>& mine) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize);
  SIMPO_SHARED(Scalar, warp_maxima, kWarps);
  SIMPO_SHARED(double, warp_sums, kWarps);
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

// Adds vectors first, first + kThreads, ... of a row, kUnroll of them; with kGuarded as many as
// there are. All loads stand before the first use, so that they are in flight together. Their terms
// are added up in Scalar, and batches in double: next to the one term of a sure label, all others
// are small and would each lose the same digits.
template <typename T, class Logits, int kThreads, int kUnroll, bool kGuarded, bool kReports>
SIMPO_DEVICE void add_vectors(const Vector16* vectors, int64_t first, int64_t num_vectors,
                              const Logits& logits, LogSumExp<Compute<T>>& sum, RowReport& report) {
  using Scalar = Compute<T>;
  constexpr int kWidth = Elements<T>::kWidth;
  Vector16 v[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    v[u] = !kGuarded || i < num_vectors ? load_streaming(vectors + i) : minus_infinities<T>();
  }
  Vector16 maxima = v[0];
  SIMPO_UNROLL
  for (int u = 1; u < kUnroll; ++u) maxima = Elements<T>::larger(maxima, v[u]);
  const Scalar largest = logits.z(Elements<T>::largest(maxima));
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
      const Scalar distance = logits.z(Elements<T>::get(v[u], k)) - reference;
      const Scalar term = fast_exp(distance);
      terms[k % 2] += term;
      if constexpr (kReports) of_report.add(k, distance, term);
    }
  }
  sum.add_terms(static_cast<double>(terms[0] + terms[1]));
  if constexpr (kReports) of_report.add_to(report, reference);
}

template <typename T, class Logits, int kThreads, int kUnroll, bool kReports>
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
  Scalar* result = static_cast<Scalar*>(is_part ? args.label_z : args.logps) + row;
  Scalar* max = static_cast<Scalar*>(args.max) + row;
  double* sum_exp = args.sum_exp + row;
  const int64_t tid = threadIdx.x;

  const int64_t label = uniform_label_at(targets, token);
  if (label == targets.ignore_index || !is_in_vocabulary(label, args.num_labels)) {
    if (tid == 0) {
      const Scalar nothing =
          label == targets.ignore_index ? Scalar(0) : std::numeric_limits<Scalar>::quiet_NaN();
      store(result, nothing);
      store(max, nothing);
      store(sum_exp, static_cast<double>(nothing));
    }
    if constexpr (kReports) {
      report_unscored_row<T, Logits, kThreads, kUnroll>(args, logits, row, token,
                                                        label == targets.ignore_index);
    }
    return;
  }

  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t);
  const int64_t column = label - args.first_label;
  const bool has_label = is_in_vocabulary(column, args.V);
  // Asked for first, so that they have come when the row is done.
  T label_x{};
  LogSumExp<Scalar> sum;
  [[maybe_unused]] RowReport report;
  if (tid == 0) {
    if (has_label) label_x = load(x + column);
    if (args.continues) sum = {load(max), load(sum_exp)};
    if (kReports && args.continues) {
      report = {load(args.mean_logit + row), load(args.entropy + row)};
    }
  }

  const RowCut<T> cut(x, args.V);
  const Vector16* vectors = cut.vectors(x);
  const int64_t num_vectors = cut.num_vectors();
  int64_t i = tid;
  for (; i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {
    add_vectors<T, Logits, kThreads, kUnroll, false, kReports>(vectors, i, num_vectors, logits, sum,
                                                               report);
  }
  if (i < num_vectors) {
    add_vectors<T, Logits, kThreads, kUnroll, true, kReports>(vectors, i, num_vectors, logits, sum,
                                                              report);
  }
  static_assert(2 * (Elements<T>::kWidth - 1) <= kThreads);
  if (tid < cut.num_edges()) {
    const Scalar z = logits.z(Elements<T>::widen(load(x + cut.element_of_edge(tid))));
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

  const LogSumExp<Scalar> logsumexp = reduce_block<Scalar, kThreads>(sum);
  if constexpr (kReports) report = reduce_block_of_reports<Scalar, kThreads>(sum, report);
  if (tid == 0) {
    const Scalar label_z = has_label ? logits.z(Elements<T>::widen(label_x))
                                     : std::numeric_limits<Scalar>::quiet_NaN();
    if (!is_part) {
      store(result, static_cast<Scalar>(logsumexp.log_probability(label_z)));
    } else if (has_label || !args.continues) {
      store(result, label_z);
    }
    store(max, logsumexp.max);
    store(sum_exp, logsumexp.sum);
    if constexpr (kReports) {
      store(args.mean_logit + row,
            is_part ? report.sum_z : report.sum_z / static_cast<double>(args.V));
      store(args.entropy + row, is_part ? report.sum_exp_z : report.entropy(logsumexp.sum));
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// What all elements of a row but its label's need: coefficient * exp(z - max) * slope.
template <typename T, class Logits>
struct RowGradient {
  using Scalar = Compute<T>;
  Logits logits;
  Scalar max;
  Scalar coefficient;

  SIMPO_DEVICE Scalar operator()(Scalar x) const {
    const Scalar z = logits.z(x);
    return coefficient * fast_exp(z - max) * logits.own_slope(z);
  }

  SIMPO_DEVICE Vector16 operator()(const Vector16& v) const {
    Scalar values[Elements<T>::kWidth];
    SIMPO_UNROLL
    for (int k = 0; k < Elements<T>::kWidth; ++k) values[k] = (*this)(Elements<T>::get(v, k));
    return Elements<T>::pack(values);
  }
};

// The gradient of vectors first, first + kThreads, ... of a row; as add_vectors. dx may be x: a
// thread overwrites only what it has read itself.
template <typename T, class Logits, int kThreads, int kUnroll, bool kGuarded>
SIMPO_DEVICE void write_vectors(const Vector16* x, Vector16* dx, int64_t first, int64_t num_vectors,
                                const RowGradient<T, Logits>& gradient) {
  Vector16 v[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (!kGuarded || i < num_vectors) v[u] = load_streaming(x + i);
  }
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (!kGuarded || i < num_vectors) store_streaming(dx + i, gradient(v[u]));
  }
}

template <typename T, class Logits, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads, kBackwardThreadsPerSM<Logits> / kThreads)
    token_logps_backward_kernel(TokenLogpsBackwardArgs args, Logits logits) {
  using Scalar = Compute<T>;
  const Targets& targets = args.targets;
  const int64_t row = row_of_block();
  if (row >= targets.B * targets.T) return;
  const Token token = token_of_row(row, targets.T);
  T* dx = static_cast<T*>(args.dlogits) + args.dlogits_strides.offset(token.b, token.t);
  const int64_t tid = threadIdx.x;

  const int64_t label = uniform_label_at(targets, token);
  const bool is_masked = label == targets.ignore_index;
  const bool is_scored = !is_masked && is_in_vocabulary(label, args.num_labels);
  const int64_t column = is_scored ? label - args.first_label : -1;
  const bool has_label = is_in_vocabulary(column, args.V);
  // Asked for together, so that the row is waited for once less.
  Scalar grad = 0, max = 0;
  double sum_exp = 1;
  if (is_scored) {
    grad = load_uniform(static_cast<const Scalar*>(args.grad_logps) +
                        args.grad_strides.offset(token.b, token.t));
    max = load_uniform(static_cast<const Scalar*>(args.max) + row);
    sum_exp = load_uniform(args.sum_exp + row);
  }
  if (grad == Scalar(0)) {
    fill_row<T, kThreads>(
        dx, args.V, is_masked || is_scored ? Scalar(0) : std::numeric_limits<Scalar>::quiet_NaN());
    if (tid == 0 && has_label && args.label_gradients != nullptr) {
      store(static_cast<Scalar*>(args.label_gradients) + row, Scalar(0));
    }
    return;
  }

  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t);
  const Scalar common_grad = grad * logits.common_slope();
  // softmax = exp(z - max) / sum_exp, with the division folded into the coefficient.
  const RowGradient<T, Logits> gradient{logits, max, -common_grad / static_cast<Scalar>(sum_exp)};

  // Vectors need rows that are aligned alike. Where they are not, as in a slice of an odd
  // vocabulary, elements go one by one.
  const bool is_aligned_alike =
      (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 == 0;
  const RowCut<T> cut(x, args.V);

  // In place, another thread may have overwritten the label's logit: it is read, and its gradient
  // written last, by the thread that writes that element anyway.
  const bool writes_label =
      has_label &&
      tid == (is_aligned_alike ? cut.thread_of_element(column, kThreads) : column % kThreads);
  const Scalar label_x = writes_label ? Elements<T>::widen(load(x + column)) : Scalar(0);

  if (is_aligned_alike) {
    const Vector16* vectors = cut.vectors(x);
    const int64_t num_vectors = cut.num_vectors();
    int64_t i = tid;
    for (; i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {
      write_vectors<T, Logits, kThreads, kUnroll, false>(vectors, cut.vectors(dx), i, num_vectors,
                                                         gradient);
    }
    if (i < num_vectors) {
      write_vectors<T, Logits, kThreads, kUnroll, true>(vectors, cut.vectors(dx), i, num_vectors,
                                                        gradient);
    }
    if (tid < cut.num_edges()) {
      const int64_t element = cut.element_of_edge(tid);
      store(dx + element, Elements<T>::narrow(gradient(Elements<T>::widen(load(x + element)))));
    }
  } else {
    for (int64_t i = tid; i < args.V; i += kThreads) {
      store(dx + i, Elements<T>::narrow(gradient(Elements<T>::widen(load(x + i)))));
    }
  }

  if (writes_label) {
    const Scalar label_z = logits.z(label_x);
    const double label_logp = LogSumExp<Scalar>{max, sum_exp}.log_probability(label_z);
    const double label_grad = static_cast<double>(common_grad) * one_minus_exp(label_logp);
    Scalar value = static_cast<Scalar>(label_grad) * logits.own_slope(label_z);
    if (args.label_gradients != nullptr) {
      // Asked anew, so that the row takes no registers until now.
      store(static_cast<Scalar*>(args.label_gradients) + row_of_block(), value);
      value = 0;
    }
    store(dx + column, Elements<T>::narrow(value));
  }
}

// ---- launches: 0 or an error code -----------------------------------------------------------

template <typename T, class Logits, int kThreads, int kUnroll, bool kReports>
int launch_token_logps(const TokenLogpsArgs& args, Stream stream) {
  return launch(token_logps_kernel<T, Logits, kThreads, kUnroll, kReports>,
                grid_of_rows(args.targets.B * args.targets.T), dim3(kThreads), stream, args,
                Logits(args.transform));
}

template <typename T, class Logits, int kThreads, int kUnroll>
int launch_token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream) {
  return launch(token_logps_backward_kernel<T, Logits, kThreads, kUnroll>,
                grid_of_rows(args.targets.B * args.targets.T), dim3(kThreads), stream, args,
                Logits(args.transform));
}

// 16-byte loads a thread has under way at once. tanh, and exp of a double, leave no registers for
// four, and take longer than memory does.
template <typename T, class Logits>
constexpr int kVectorsInFlight = sizeof(T) == 8 || Logits::kIsCapped ? 2 : 4;

// token_logps of a batch that is not empty, with a report; in a file of its own, as these kernels
// are many.
int token_logps_report(const TokenLogpsArgs& args, Stream stream);

// From this many bytes on, a row keeps a large block busy.
constexpr int64_t kLargeRowBytes = 16384;

// Of a batch that is not empty: the kernel that the call takes.
template <bool kReports>
int dispatch_token_logps(const TokenLogpsArgs& args, Stream stream) {
  int error = 0;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    using T = typename decltype(element)::type;
    using Logits = typename decltype(logits)::type;
    constexpr int kUnroll = kVectorsInFlight<T, Logits>;
    if (args.V * static_cast<int64_t>(sizeof(T)) >= kLargeRowBytes) {
      error = launch_token_logps<T, Logits, 256, kUnroll, kReports>(args, stream);
    } else {
      error = launch_token_logps<T, Logits, 128, kUnroll, kReports>(args, stream);
    }
  });
  return error;
}

}  // namespace simpo_ext::cuda
