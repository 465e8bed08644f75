// The backward of token_logps. token_logps.cuh has its memory contract.
#pragma once

#include <cstdint>
#include <limits>

#include "core/dtypes.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rounded.h"
#include "cuda/rows.h"
#include "cuda/token_logps.cuh"

namespace simpo_ext::cuda {

// The number of threads that must fit on a multiprocessor. This limits a kernel to 64 registers, or
// to 128 for the exp of a double, which is enough to spill none.
template <class Logits>
constexpr int kBackwardThreadsPerSM = sizeof(typename Logits::ScalarType) == 8 ? 512 : 1024;

// The gradient of each element of a row except its label's: coefficient * exp(z - max) * slope.
template <typename T, class Logits>
struct RowGradient {
  using Scalar = Compute<T>;
  Logits logits;
  Scalar max;
  Scalar coefficient;

  SIMPO_DEVICE Scalar operator()(Scalar x) const {
    const Scalar z = transformed(logits, x);
    return coefficient * fast_exp(z - max) * own_slope(logits, z);
  }

  SIMPO_DEVICE Vector16 operator()(const Vector16& v) const {
    Scalar values[Elements<T>::kWidth];
    SIMPO_UNROLL
    for (int k = 0; k < Elements<T>::kWidth; ++k) values[k] = (*this)(Elements<T>::get(v, k));
    return Elements<T>::pack(values);
  }
};

// Writes the gradient of kUnroll vectors, numbered as in add_vectors. dx may be x: a thread
// overwrites only what it has read itself.
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

template <typename T, class Logits, int kThreads, int kUnroll, bool kIsOneSegment>
__global__ void __launch_bounds__(kThreads, kBackwardThreadsPerSM<Logits> / kThreads)
    token_logps_backward_kernel(TokenLogpsBackwardArgs args, Logits logits) {
  using Scalar = Compute<T>;
  const Targets& targets = args.targets;
  const int64_t row = row_of_block();
  if (row >= targets.B * targets.T) return;
  const Token token = token_of_row(row, targets.T);
  const int64_t tid = threadIdx.x;
  const RowSegments<T, kIsOneSegment, true> segments(args.V);
  const int64_t first_column = segments.first_column_of_block();
  const int64_t V = segments.columns_of_block();
  T* dx =
      static_cast<T*>(args.dlogits) + args.dlogits_strides.offset(token.b, token.t) + first_column;

  // Loaded together, so that the row waits for memory only once. The label may show that the others
  // are not needed.
  const int64_t label = uniform_label_at(targets, token);
  const Scalar grad = load_uniform_early(static_cast<const Scalar*>(args.grad_logps) +
                                         args.grad_strides.offset(token.b, token.t));
  const Scalar max = load_uniform_early(static_cast<const Scalar*>(args.max) + row);
  const double sum_exp = load_uniform_early(args.sum_exp + row);

  const bool is_masked = label == targets.ignore_index;
  const bool is_scored = !is_masked && is_in_vocabulary(label, args.num_labels);
  const int64_t column = is_scored ? label - args.first_label - first_column : -1;
  const bool has_label = is_in_vocabulary(column, V);
  if (!is_scored || grad == Scalar(0)) {
    fill_row<T, kThreads>(
        dx, V, is_masked || is_scored ? Scalar(0) : std::numeric_limits<Scalar>::quiet_NaN());
    if (tid == 0 && has_label && args.label_gradients != nullptr) {
      store(static_cast<Scalar*>(args.label_gradients) + row, Scalar(0));
    }
    return;
  }

  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t) +
               first_column;
  const Scalar common_grad = grad * logits.common_slope();
  // softmax = exp(z - max) / sum_exp, with the division folded into the coefficient.
  const RowGradient<T, Logits> gradient{logits, max, -common_grad / static_cast<Scalar>(sum_exp)};

  // Vector access needs x and dx to have the same alignment. If they differ, as in a slice of an
  // odd vocabulary, threads access single elements.
  const bool is_aligned_alike =
      (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 == 0;
  const RowCut<T> cut(x, V);

  // In place, another thread may already have overwritten the label's logit. So the thread that
  // writes this element reads it first, and writes the label's gradient last.
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
      write_vectors<T, Logits, kThreads, kUnroll - 1, true>(vectors, cut.vectors(dx), i,
                                                            num_vectors, gradient);
    }
    if (tid < cut.num_edges()) {
      const int64_t element = cut.element_of_edge(tid);
      store(dx + element, Elements<T>::narrow(gradient(Elements<T>::widen(load(x + element)))));
    }
  } else {
    for (int64_t i = tid; i < V; i += kThreads) {
      store(dx + i, Elements<T>::narrow(gradient(Elements<T>::widen(load(x + i)))));
    }
  }

  if (writes_label) {
    const Scalar label_z = transformed(logits, label_x);
    const double label_logp = LogSumExp<Scalar>{max, sum_exp}.log_probability(label_z);
    const double label_grad = static_cast<double>(common_grad) * one_minus_exp(label_logp);
    Scalar value = static_cast<Scalar>(label_grad) * own_slope(logits, label_z);
    if (args.label_gradients != nullptr) {
      // row_of_block() is computed again, since keeping the row takes registers in the loop.
      store(static_cast<Scalar*>(args.label_gradients) + row_of_block(), value);
      value = 0;
    }
    store(dx + column, Elements<T>::narrow(value));
  }
}

// ---- launches: 0 or an error code -----------------------------------------------------------

template <typename T, class Logits, int kThreads, int kUnroll, bool kIsOneSegment>
int launch_token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream) {
  const int64_t N = args.targets.B * args.targets.T;
  const unsigned blocks = kIsOneSegment ? 1 : blocks_per_row(N, num_segments<T>(args.V));
  return launch(token_logps_backward_kernel<T, Logits, kThreads, kUnroll, kIsOneSegment>,
                grid_of_rows(N, blocks), dim3(kThreads), stream, args, Logits(args.transform));
}

}  // namespace simpo_ext::cuda
