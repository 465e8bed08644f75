// Per-token log-probabilities on the CPU: selects rows and divides them among threads.
// row_kernels.inl has the passes over a row.
//
// Memory contract, per row of V logits:
//   forward   reads a valid row once and writes 16 bytes, or 24 for float64. For a masked row, it
//             reads only the label. A report writes 16 bytes more and, for all positions, reads
//             masked rows once.
//   backward  reads a valid row once and writes it once, also in place. If a row is masked or its
//             incoming gradient is 0, it writes zeros without reading the row, or nothing if
//             dlogits already holds zeros.
// Scratch: 8 bytes a row, and 32 bytes for each piece of a row longer than kPieceLength. Nothing of
// size [B, T, V] is allocated.
//
// The order of a row's sum depends only on V, so its result has the same bits in any batch and with
// any number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "cpu/capability.h"
#include "cpu/labels.h"
#include "cpu/tasks.h"

namespace simpo_ext::cpu {
namespace {

// The rows for which predicate(b, t) is true, as b * T + t.
template <typename Predicate>
std::vector<int64_t> select_rows(const Targets& targets, const Predicate& predicate) {
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < targets.B; ++b) {
    for (int64_t t = 0; t < targets.T; ++t) {
      if (predicate(b, t)) rows.push_back(b * targets.T + t);
    }
  }
  return rows;
}

// Logits as bytes, for any dtype.
template <typename Byte>
struct Elements {
  Byte* data;
  int64_t size;

  Byte* at(int64_t offset) const { return data + offset * size; }
};

template <typename Scalar>
void forward(const TokenLogpsArgs& args, ParallelFor parallel_for) {
  const RowKernels& kernels = row_kernels();
  const Targets& targets = args.targets;
  const Elements<const char> logits{static_cast<const char*>(args.logits), size_of(args.dtype)};
  // For a part of the vocabulary, the result of a row is its label's z.
  const bool is_part = args.label_z != nullptr;
  Scalar* result = static_cast<Scalar*>(is_part ? args.label_z : args.logps);
  Scalar* max = static_cast<Scalar*>(args.max);
  if (!args.continues) {
    std::fill_n(result, targets.B * targets.T, Scalar(0));
    std::fill_n(max, targets.B * targets.T, Scalar(0));
    std::fill_n(args.sum_exp, targets.B * targets.T, 0.0);
  }
  const bool is_reporting = args.mean_logit != nullptr;
  if (is_reporting && !args.continues) {
    std::fill_n(args.mean_logit, targets.B * targets.T, 0.0);
    std::fill_n(args.entropy, targets.B * targets.T, 0.0);
  }

  const std::vector<int64_t> rows = select_rows(
      targets, [&](int64_t b, int64_t t) { return args.all_positions || targets.is_valid(b, t); });
  const auto is_masked = [&](int64_t row) {
    return args.all_positions && !targets.is_valid(row / targets.T, row % targets.T);
  };
  const int64_t num_rows = static_cast<int64_t>(rows.size()), pieces = pieces_of_row(args.V);
  const auto row_at = [&](int64_t row) {
    return args.logits_strides.offset(row / targets.T, row % targets.T);
  };
  const auto label_column = [&](int64_t row) {
    return targets.at(row / targets.T, row % targets.T) - args.first_label;
  };
  const auto has_label = [&](int64_t row) {
    return label_column(row) >= 0 && label_column(row) < args.V;
  };
  const auto z_at = [&](int64_t row, int64_t column) {
    return kernels.z(args.dtype, args.transform, logits.at(row_at(row) + column));
  };
  // A z that is likely close to the row's largest: the label's, if this part has it.
  const auto hint = [&](int64_t row) {
    if (has_label(row)) return z_at(row, label_column(row));
    return args.continues ? static_cast<double>(max[row]) : z_at(row, 0);
  };
  const auto sum_piece = [&](int64_t row, int64_t piece) {
    const int64_t begin = piece * kPieceLength;
    const char* x = logits.at(row_at(row) + begin);
    const int64_t length = std::min(kPieceLength, args.V - begin);
    RunReport run{};
    if (is_masked(row)) {
      run.report.sum_z = kernels.sum_z(args.dtype, args.transform, x, length);
    } else if (is_reporting) {
      run = kernels.sum_exp_report(args.dtype, args.transform, x, length, hint(row));
    } else {
      run.sum = kernels.sum_exp(args.dtype, args.transform, x, length, hint(row));
    }
    return run;
  };
  // Call before write_row overwrites max and sum_exp of the earlier parts.
  const auto write_report = [&](int64_t row, const LogSumExp<Scalar>& logsumexp, RowReport report) {
    if (is_part) {
      if (args.continues) {
        const RowReport of_this_part = report;
        report = {args.mean_logit[row], args.entropy[row]};
        report.merge(LogSumExp<Scalar>{max[row], args.sum_exp[row]}, of_this_part, logsumexp);
      }
      args.mean_logit[row] = report.sum_z;
      args.entropy[row] = report.sum_exp_z;
      return;
    }
    args.mean_logit[row] = report.sum_z / static_cast<double>(args.V);
    args.entropy[row] = is_masked(row) ? 0.0 : report.entropy(logsumexp.sum);
  };
  const auto write_row = [&](int64_t row, LogSumExp<Scalar> logsumexp, const RowReport& report) {
    if (is_reporting) write_report(row, logsumexp, report);
    if (is_masked(row)) return;
    if (!is_part) {
      const Scalar z = static_cast<Scalar>(z_at(row, label_column(row)));
      result[row] = static_cast<Scalar>(logsumexp.log_probability(z));
    } else if (has_label(row)) {
      result[row] = static_cast<Scalar>(z_at(row, label_column(row)));
    } else if (!args.continues) {
      result[row] = std::numeric_limits<Scalar>::quiet_NaN();
    }
    if (args.continues) {
      const LogSumExp<Scalar> of_this_part = logsumexp;
      logsumexp = {max[row], args.sum_exp[row]};
      logsumexp.merge(of_this_part);
    }
    max[row] = logsumexp.max;
    args.sum_exp[row] = logsumexp.sum;
  };

  if (pieces == 1) {
    for_each_in_runs(parallel_for, num_rows, args.V, [&](int64_t i) {
      const int64_t row = rows[static_cast<size_t>(i)];
      const RunReport run = sum_piece(row, 0);
      write_row(row, {static_cast<Scalar>(run.sum.max), run.sum.sum}, run.report);
    });
    return;
  }
  std::vector<RunReport> sums(static_cast<size_t>(num_rows * pieces));
  for_each_in_runs(parallel_for, num_rows * pieces, kPieceLength, [&](int64_t i) {
    const int64_t row = rows[static_cast<size_t>(i / pieces)];
    sums[static_cast<size_t>(i)] = sum_piece(row, i % pieces);
  });
  for_each_in_runs(parallel_for, num_rows, 1024 * pieces, [&](int64_t i) {
    LogSumExp<Scalar> logsumexp;
    RowReport report;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const RunReport& run = sums[static_cast<size_t>(i * pieces + piece)];
      const LogSumExp<Scalar> of_piece{static_cast<Scalar>(run.sum.max), run.sum.sum};
      if (is_reporting) report.merge(logsumexp, run.report, of_piece);
      logsumexp.merge(of_piece);
    }
    write_row(rows[static_cast<size_t>(i)], logsumexp, report);
  });
}

// About the size of the caches. Stores of a larger gradient bypass them.
constexpr int64_t kStreamingBytes = int64_t{1} << 24;

template <typename T, class Logits>
void backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for) {
  using Scalar = Compute<T>;
  const RowKernels& kernels = row_kernels();
  const Logits transformed(args.transform);
  const Targets& targets = args.targets;
  const T* logits = static_cast<const T*>(args.logits);
  const Scalar* grad_logps = static_cast<const Scalar*>(args.grad_logps);
  const Scalar* max = static_cast<const Scalar*>(args.max);
  T* dlogits = static_cast<T*>(args.dlogits);
  Scalar* label_gradients = static_cast<Scalar*>(args.label_gradients);

  const auto needs_softmax = [&](int64_t b, int64_t t) {
    return targets.is_valid(b, t) && grad_logps[args.grad_strides.offset(b, t)] != Scalar(0);
  };
  const std::vector<int64_t> rows = select_rows(targets, [&](int64_t b, int64_t t) {
    return !args.dlogits_holds_zeros || needs_softmax(b, t);
  });
  const int64_t pieces = pieces_of_row(args.V);
  // In place, the row is in the caches. An ordinary store to another buffer that does not fit the
  // caches would read its memory first.
  const int64_t bytes = static_cast<int64_t>(rows.size()) * args.V * int64_t{sizeof(T)};
  const bool streaming = args.dlogits != args.logits && bytes >= kStreamingBytes;

  const auto do_piece = [&](int64_t i) {
    const int64_t row = rows[static_cast<size_t>(i / pieces)];
    const int64_t b = row / targets.T, t = row % targets.T;
    const int64_t begin = i % pieces * kPieceLength;
    const int64_t length = std::min(kPieceLength, args.V - begin);
    T* dx = dlogits + args.dlogits_strides.offset(b, t) + begin;
    const int64_t label = targets.at(b, t) - args.first_label - begin;
    const bool has_label = label >= 0 && label < length;
    if (!needs_softmax(b, t)) {
      std::memset(dx, 0, static_cast<size_t>(length) * sizeof(T));
      if (label_gradients != nullptr && targets.is_valid(b, t) && has_label) {
        label_gradients[row] = Scalar(0);
      }
      return;
    }
    const T* x = logits + args.logits_strides.offset(b, t) + begin;
    const LogSumExp<Scalar> logsumexp{max[row], args.sum_exp[row]};
    const double grad = static_cast<double>(grad_logps[args.grad_strides.offset(b, t)]);
    const double common_grad = grad * static_cast<double>(transformed.common_slope());
    // Read before dx overwrites it.
    const double label_z = has_label ? kernels.z(args.dtype, args.transform, x + label) : 0.0;
    // softmax = exp(z - max) / sum, with the division folded into the factor.
    kernels.scaled_exp(args.dtype, args.transform, x, length, static_cast<double>(max[row]),
                       -common_grad / logsumexp.sum, dx, streaming);
    if (has_label) {
      const Scalar z = static_cast<Scalar>(label_z);
      const double one_minus_p = one_minus_exp(logsumexp.log_probability(z));
      const double slope = static_cast<double>(transformed.own_slope(z));
      const Scalar label_gradient = static_cast<Scalar>(common_grad * one_minus_p * slope);
      if (label_gradients != nullptr) label_gradients[row] = label_gradient;
      dx[label] = narrow<T>(label_gradients != nullptr ? Scalar(0) : label_gradient);
    }
  };
  for_each_in_runs(parallel_for, static_cast<int64_t>(rows.size()) * pieces,
                   std::min(args.V, kPieceLength), do_piece);
}

}  // namespace

LabelError token_logps(const TokenLogpsArgs& args, ParallelFor parallel_for) {
  if (!args.continues) {
    const LabelError error = find_label_error(args.targets, args.num_labels);
    if (error.found()) return error;
  }
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, parallel_for); });
  return {};
}

LabelError token_logps_backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for) {
  if (args.label_gradients == nullptr) {
    const LabelError error = find_label_error(args.targets, args.num_labels);
    if (error.found()) return error;
  }
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    backward<typename decltype(element)::type, typename decltype(logits)::type>(args, parallel_for);
  });
  return {};
}

}  // namespace simpo_ext::cpu
