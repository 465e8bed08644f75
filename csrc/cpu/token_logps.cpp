// Per-token log-probabilities on the CPU.
//
// Memory contract, per row of V logits:
//   forward   reads a valid row once, writes 16 bytes (24 for float64); a masked row costs its
//   label. backward  reads a valid row once and writes it once, also in place; a masked row, or one
//   whose
//             incoming gradient is 0, is written (zeros) and not read.
// Scratch: 8 bytes a token for the lists of rows to do. Nothing of size [B, T, V] is allocated.
//
// A row is reduced by one thread in an order that depends on V alone, so its result has the same
// bits whatever stands beside it and however many threads there are.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "cpu/fast_exp.h"

namespace simpo_ext::cpu {
namespace {

// A block stays in the first-level cache between its maximum and its sum, which is what makes the
// pass over memory a single one. Sums are pairwise within a block and in double across blocks, so
// that float32 rounding stays below that of the terms themselves.
constexpr int64_t kBlock = 1024;

// Below this many logits a second thread costs more than it saves.
constexpr int64_t kLogitsPerTask = 1 << 15;

int64_t rows_per_task(int64_t V) {
  return std::max<int64_t>(1, kLogitsPerTask / std::max<int64_t>(V, 1));
}

// z[0, n) = logits.z(x[0, n)).
template <typename T, class Logits>
void load_block(const T* x, int64_t n, const Logits& logits, Compute<T>* z) {
  for (int64_t i = 0; i < n; ++i) z[i] = logits.z(widen(x[i]));
}

// Folds the upper half of values onto the lower until one is left: loops without a carried
// dependency, which compilers vectorise where they must keep the order of a running sum. Overwrites
// values; n > 0.
template <typename Scalar, typename Combine>
Scalar fold(Scalar* values, int64_t n, const Combine& combine) {
  while (n > 1) {
    const int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < n - half; ++i) values[i] = combine(values[i], values[i + half]);
    n = half;
  }
  return values[0];
}

// Ignores NaN unless it stands first; the sum of exponentials brings every NaN to light.
template <typename Scalar>
Scalar block_max(const Scalar* z, int64_t n, Scalar* scratch) {
  const int64_t half = (n + 1) / 2;
  const auto max = [](Scalar a, Scalar b) { return b > a ? b : a; };
  for (int64_t i = 0; i < half; ++i) scratch[i] = max(z[i], z[n - half + i]);
  return fold(scratch, half, max);
}

template <typename Scalar>
double block_sum_exp(const Scalar* z, int64_t n, Scalar reference, Scalar* scratch) {
  for (int64_t i = 0; i < n; ++i) scratch[i] = fast_exp(z[i] - reference);
  return static_cast<double>(fold(scratch, n, [](Scalar a, Scalar b) { return a + b; }));
}

template <typename T, class Logits>
LogSumExp<Compute<T>> row_logsumexp(const T* x, int64_t V, const Logits& logits) {
  LogSumExp<Compute<T>> logsumexp;
  alignas(64) Compute<T> z[kBlock];
  alignas(64) Compute<T> scratch[kBlock];
  for (int64_t i = 0; i < V; i += kBlock) {
    const int64_t n = std::min(kBlock, V - i);
    load_block(x + i, n, logits, z);
    logsumexp.raise_max(block_max(z, n, scratch));
    logsumexp.add_terms(block_sum_exp(z, n, logsumexp.reference(), scratch));
  }
  return logsumexp;
}

// dx may be x.
template <typename T, class Logits>
void row_gradient(const T* x, int64_t V, int64_t label, const Logits& logits,
                  const LogSumExp<Compute<T>>& logsumexp, double grad, T* dx) {
  using Scalar = Compute<T>;
  const Scalar label_z = logits.z(widen(x[label]));  // before dx overwrites it

  // softmax = exp(z - max) / sum, with the division folded into the coefficient.
  const Scalar max = logsumexp.max;
  const double common_grad = grad * static_cast<double>(logits.common_slope());
  const Scalar coefficient = static_cast<Scalar>(-common_grad / logsumexp.sum);
  alignas(64) Scalar z[kBlock];
  alignas(64) T out[kBlock];
  for (int64_t i = 0; i < V; i += kBlock) {
    const int64_t n = std::min(kBlock, V - i);
    load_block(x + i, n, logits, z);
    for (int64_t j = 0; j < n; ++j) {
      out[j] = narrow<T>(coefficient * fast_exp(z[j] - max) * logits.own_slope(z[j]));
    }
    std::copy(out, out + n, dx + i);
  }

  const double one_minus_p = one_minus_exp(logsumexp.log_probability(label_z));
  const double slope = static_cast<double>(logits.own_slope(label_z));
  dx[label] = narrow<T>(static_cast<Scalar>(common_grad * one_minus_p * slope));
}

LabelError find_label_error(const Targets& targets, int64_t V) {
  for (int64_t b = 0; b < targets.B; ++b) {
    for (int64_t t = 0; t < targets.T; ++t) {
      const int64_t label = targets.at(b, t);
      if (label != targets.ignore_index && (label < 0 || label >= V)) {
        return {b, targets.label_position(t), label};
      }
    }
  }
  return {};
}

// Rows as b * T + t. Threads share a list of rows that all cost the same.
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

template <typename T, class Logits>
void forward(const TokenLogpsArgs& args, ParallelFor parallel_for) {
  using Scalar = Compute<T>;
  const Logits transformed(args.transform);
  const Targets& targets = args.targets;
  const T* logits = static_cast<const T*>(args.logits);
  Scalar* logps = static_cast<Scalar*>(args.logps);
  Scalar* max = static_cast<Scalar*>(args.max);
  std::fill_n(logps, targets.B * targets.T, Scalar(0));
  std::fill_n(max, targets.B * targets.T, Scalar(0));
  std::fill_n(args.sum_exp, targets.B * targets.T, 0.0);

  const std::vector<int64_t> rows =
      select_rows(targets, [&](int64_t b, int64_t t) { return targets.is_valid(b, t); });
  const auto do_rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = rows[static_cast<size_t>(i)], b = row / targets.T, t = row % targets.T;
      const T* x = logits + args.logits_strides.offset(b, t);
      const LogSumExp<Scalar> logsumexp = row_logsumexp(x, args.V, transformed);
      const Scalar label_z = transformed.z(widen(x[targets.at(b, t)]));
      logps[row] = static_cast<Scalar>(logsumexp.log_probability(label_z));
      max[row] = logsumexp.max;
      args.sum_exp[row] = logsumexp.sum;
    }
  };
  parallel_for(0, static_cast<int64_t>(rows.size()), rows_per_task(args.V), do_rows);
}

template <typename T, class Logits>
void backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for) {
  using Scalar = Compute<T>;
  const Logits transformed(args.transform);
  const Targets& targets = args.targets;
  const T* logits = static_cast<const T*>(args.logits);
  const Scalar* grad_logps = static_cast<const Scalar*>(args.grad_logps);
  const Scalar* max = static_cast<const Scalar*>(args.max);
  T* dlogits = static_cast<T*>(args.dlogits);

  const auto needs_softmax = [&](int64_t b, int64_t t) {
    return targets.is_valid(b, t) && grad_logps[args.grad_strides.offset(b, t)] != Scalar(0);
  };
  const std::vector<int64_t> rows = select_rows(targets, needs_softmax);
  const auto do_rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = rows[static_cast<size_t>(i)], b = row / targets.T, t = row % targets.T;
      row_gradient(logits + args.logits_strides.offset(b, t), args.V, targets.at(b, t), transformed,
                   LogSumExp<Scalar>{max[row], args.sum_exp[row]},
                   static_cast<double>(grad_logps[args.grad_strides.offset(b, t)]),
                   dlogits + args.dlogits_strides.offset(b, t));
    }
  };
  const std::vector<int64_t> zero_rows =
      select_rows(targets, [&](int64_t b, int64_t t) { return !needs_softmax(b, t); });
  const auto do_zero_rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = zero_rows[static_cast<size_t>(i)];
      T* dx = dlogits + args.dlogits_strides.offset(row / targets.T, row % targets.T);
      std::memset(dx, 0, static_cast<size_t>(args.V) * sizeof(T));
    }
  };
  parallel_for(0, static_cast<int64_t>(rows.size()), rows_per_task(args.V), do_rows);
  parallel_for(0, static_cast<int64_t>(zero_rows.size()), rows_per_task(args.V), do_zero_rows);
}

}  // namespace

LabelError token_logps(const TokenLogpsArgs& args, ParallelFor parallel_for) {
  const LabelError error = find_label_error(args.targets, args.V);
  if (error.found()) return error;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    forward<typename decltype(element)::type, typename decltype(logits)::type>(args, parallel_for);
  });
  return error;
}

LabelError token_logps_backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for) {
  const LabelError error = find_label_error(args.targets, args.V);
  if (error.found()) return error;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    backward<typename decltype(element)::type, typename decltype(logits)::type>(args, parallel_for);
  });
  return error;
}

}  // namespace simpo_ext::cpu
