// Per-token log-probabilities on the GPU: a block of threads for each token row.
//
// Memory contract, per row of V logits of e bytes:
//   forward   a valid row is read once, plus its label's logit again: (V + 1) e; 8 + 4 + 4 bytes
//   are
//             written (8 + 8 + 8 for float64). A masked row costs one label load.
//   backward  a valid row is read and written once, plus its label's logit and gradient again; also
//             in place. A masked row, or one whose incoming gradient is 0, is written (zeros) and
//             not read.
// No scratch. A label outside [0, V) is not followed: its row becomes NaN.
//
// Every sum has a fixed order, so equal inputs at equal alignments give equal bits. Rows may start
// at any element; 16-byte accesses begin at the first aligned one.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/dtypes.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace simpo_ext::cuda {

// ---- logit transforms, known at compile time so that the common one costs nothing -----------

template <typename ScalarType, bool kHasSoftcap>
class Transform {
 public:
  using Scalar = ScalarType;
  static constexpr bool kSoftcap = kHasSoftcap;

  explicit Transform(LogitTransform transform)
      : transform_{transform.logit_scale, kHasSoftcap ? transform.softcap : 0.0} {}

  // Of the logit x. Increasing, so that the largest z is that of the largest x.
  SIMPO_DEVICE Scalar z(Scalar x) const { return transform_logit(x, transform()); }

  // dz/dx, divided by the factor that all logits share.
  SIMPO_DEVICE Scalar relative_slope(Scalar z) const {
    return kHasSoftcap ? transform_logit_slope(z, {1.0, transform_.softcap}) : Scalar(1);
  }
  SIMPO_DEVICE Scalar common_slope() const { return static_cast<Scalar>(transform_.logit_scale); }

  SIMPO_DEVICE LogitTransform transform() const {
    // The compiler sees that softcap is 0, and drops the branch on it.
    return {transform_.logit_scale, kHasSoftcap ? transform_.softcap : 0.0};
  }

 private:
  LogitTransform transform_;
};

template <typename Scalar>
using LinearTransform = Transform<Scalar, false>;
template <typename Scalar>
using SoftcapTransform = Transform<Scalar, true>;

// Threads that fit on a multiprocessor of the architecture that is being compiled for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || \
                               __CUDA_ARCH__ == 890 || __CUDA_ARCH__ / 100 == 12)
constexpr int kMaxThreadsPerSM = 1536;
#else
constexpr int kMaxThreadsPerSM = 2048;
#endif

// How many threads shall fit on a multiprocessor. The limit of registers that this sets is what
// each kernel needs without spills: 32 (40 where fewer threads fit) in the forward of the common
// case, else 64, and 128 for exp of a double.
template <class Transform>
constexpr int kForwardThreadsPerSM = sizeof(typename Transform::Scalar) == 8 ? 512
                                     : Transform::kSoftcap                   ? 1024
                                                                             : kMaxThreadsPerSM;
template <class Transform>
constexpr int kBackwardThreadsPerSM = sizeof(typename Transform::Scalar) == 8 ? 512 : 1024;

// ---- forward --------------------------------------------------------------------------------

// What one thread has seen of a row: sum(exp(z - max)). Few enough terms for Scalar.
template <typename Scalar>
struct ThreadSum {
  Scalar max = -std::numeric_limits<Scalar>::infinity();
  Scalar sum = 0;

  SIMPO_DEVICE Scalar reference() const { return finite_reference(max); }

  // -inf - -inf is NaN, so while nothing above -inf has been seen, 0 is subtracted instead.
  SIMPO_DEVICE static Scalar finite_reference(Scalar max) {
    return max == -std::numeric_limits<Scalar>::infinity() ? Scalar(0) : max;
  }

  SIMPO_DEVICE void raise_max(Scalar new_max) {
    if (new_max > max) {
      sum *= fast_exp(max - new_max);
      max = new_max;
    }
  }
};

// The threads' sums together, in thread 0. Each warp's share in Scalar, across warps in double.
template <typename Scalar, int kThreads>
SIMPO_DEVICE LogSumExp<Scalar> reduce_block(const ThreadSum<Scalar>& mine) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize);
  SIMPO_SHARED(Scalar, warp_maxima, kWarps);
  SIMPO_SHARED(Scalar, warp_sums, kWarps);
  const auto max = [](Scalar a, Scalar b) { return larger(a, b); };
  const auto add = [](auto a, auto b) { return a + b; };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  const Scalar warp_max = reduce_warp(mine.max, max);
  const Scalar rescaled =
      mine.sum * fast_exp(mine.max - ThreadSum<Scalar>::finite_reference(warp_max));
  const Scalar warp_sum = reduce_warp(rescaled, add);
  if (lane == 0) {
    warp_maxima[warp] = warp_max;
    warp_sums[warp] = warp_sum;
  }
  __syncthreads();

  LogSumExp<Scalar> result;
  if (warp == 0) {
    const ThreadSum<Scalar> of_warp =
        lane < kWarps ? ThreadSum<Scalar>{warp_maxima[lane], warp_sums[lane]} : ThreadSum<Scalar>{};
    result.max = reduce_warp(of_warp.max, max);
    const Scalar scale = fast_exp(of_warp.max - result.reference());
    result.sum = reduce_warp(static_cast<double>(of_warp.sum * scale), add);
  }
  return result;
}

// Adds vectors first, first + kThreads, ... of a row, kUnroll of them; with kGuarded as many as
// there are. All loads stand before the first use, so that they are in flight together.
template <typename T, class Transform, int kThreads, int kUnroll, bool kGuarded>
SIMPO_DEVICE void add_vectors(const Vector16* vectors, int64_t first, int64_t num_vectors,
                              const Transform& transform, ThreadSum<Compute<T>>& sum) {
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
  sum.raise_max(transform.z(Elements<T>::largest(maxima)));

  const Scalar reference = sum.reference();
  Scalar terms[2] = {0, 0};  // two chains of additions, which overlap
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    if (kGuarded && first + u * kThreads >= num_vectors) break;
    SIMPO_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      terms[k % 2] += fast_exp(transform.z(Elements<T>::get(v[u], k)) - reference);
    }
  }
  sum.sum += terms[0] + terms[1];
}

template <typename T, class Transform, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads, kForwardThreadsPerSM<Transform> / kThreads)
    token_logps_kernel(TokenLogpsArgs args, Transform transform) {
  using Scalar = Compute<T>;
  const Targets& targets = args.targets;
  const int64_t row = row_of_block();
  if (row >= targets.B * targets.T) return;
  const Token token = token_of_row(row, targets.T);
  Scalar* logps = static_cast<Scalar*>(args.logps) + row;
  Scalar* max = static_cast<Scalar*>(args.max) + row;
  double* sum_exp = args.sum_exp + row;
  const int64_t tid = threadIdx.x;

  const int64_t label = uniform_label_at(targets, token);
  if (label == targets.ignore_index || !is_in_vocabulary(label, args.V)) {
    if (tid == 0) {
      const Scalar nothing =
          label == targets.ignore_index ? Scalar(0) : std::numeric_limits<Scalar>::quiet_NaN();
      store(logps, nothing);
      store(max, nothing);
      store(sum_exp, static_cast<double>(nothing));
    }
    return;
  }

  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t);
  // Asked for first, so that it has come when the row is done.
  const Scalar label_x = tid == 0 ? Elements<T>::widen(load(x + label)) : Scalar(0);

  const RowCut<T> cut(x, args.V);
  const Vector16* vectors = cut.vectors(x);
  const int64_t num_vectors = cut.num_vectors();
  ThreadSum<Scalar> sum;
  int64_t i = tid;
  for (; i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {
    add_vectors<T, Transform, kThreads, kUnroll, false>(vectors, i, num_vectors, transform, sum);
  }
  if (i < num_vectors) {
    add_vectors<T, Transform, kThreads, kUnroll, true>(vectors, i, num_vectors, transform, sum);
  }
  static_assert(2 * (Elements<T>::kWidth - 1) <= kThreads);
  if (tid < cut.num_edges()) {
    const Scalar z = transform.z(Elements<T>::widen(load(x + cut.element_of_edge(tid))));
    sum.raise_max(z);
    sum.sum += fast_exp(z - sum.reference());
  }

  const LogSumExp<Scalar> logsumexp = reduce_block<Scalar, kThreads>(sum);
  if (tid == 0) {
    store(logps, static_cast<Scalar>(logsumexp.log_probability(transform.z(label_x))));
    store(max, logsumexp.max);
    store(sum_exp, logsumexp.sum);
  }
}

// ---- backward -------------------------------------------------------------------------------

// dx[0, V) = value.
template <typename T, int kThreads>
SIMPO_DEVICE void fill_row(T* dx, int64_t V, Compute<T> value) {
  constexpr int kWidth = Elements<T>::kWidth;
  const RowCut<T> cut(dx, V);
  Compute<T> values[kWidth];
  SIMPO_UNROLL
  for (int k = 0; k < kWidth; ++k) values[k] = value;
  const Vector16 v = Elements<T>::pack(values);
  const int64_t tid = threadIdx.x;
  for (int64_t i = tid; i < cut.num_vectors(); i += kThreads)
    store_streaming(cut.vectors(dx) + i, v);
  if (tid < cut.num_edges()) store(dx + cut.element_of_edge(tid), Elements<T>::narrow(value));
}

// What all elements of a row but its label's need: coefficient * exp(z - max) * slope.
template <typename T, class Transform>
struct RowGradient {
  using Scalar = Compute<T>;
  Transform transform;
  Scalar max;
  Scalar coefficient;

  SIMPO_DEVICE Scalar operator()(Scalar x) const {
    const Scalar z = transform.z(x);
    return coefficient * fast_exp(z - max) * transform.relative_slope(z);
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
template <typename T, class Transform, int kThreads, int kUnroll, bool kGuarded>
SIMPO_DEVICE void write_vectors(const Vector16* x, Vector16* dx, int64_t first, int64_t num_vectors,
                                const RowGradient<T, Transform>& gradient) {
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

template <typename T, class Transform, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads, kBackwardThreadsPerSM<Transform> / kThreads)
    token_logps_backward_kernel(TokenLogpsBackwardArgs args, Transform transform) {
  using Scalar = Compute<T>;
  const Targets& targets = args.targets;
  const int64_t row = row_of_block();
  if (row >= targets.B * targets.T) return;
  const Token token = token_of_row(row, targets.T);
  T* dx = static_cast<T*>(args.dlogits) + args.dlogits_strides.offset(token.b, token.t);
  const int64_t tid = threadIdx.x;

  const int64_t label = uniform_label_at(targets, token);
  const bool is_masked = label == targets.ignore_index;
  const bool is_scored = !is_masked && is_in_vocabulary(label, args.V);
  const Scalar grad = is_scored ? load_uniform(static_cast<const Scalar*>(args.grad_logps) +
                                               args.grad_strides.offset(token.b, token.t))
                                : Scalar(0);
  if (grad == Scalar(0)) {
    fill_row<T, kThreads>(
        dx, args.V, is_masked || is_scored ? Scalar(0) : std::numeric_limits<Scalar>::quiet_NaN());
    return;
  }

  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t);
  const Scalar max = load_uniform(static_cast<const Scalar*>(args.max) + row);
  const double sum_exp = load_uniform(args.sum_exp + row);
  const Scalar common_grad = grad * transform.common_slope();
  // softmax = exp(z - max) / sum_exp, with the division folded into the coefficient.
  const RowGradient<T, Transform> gradient{transform, max,
                                           -common_grad / static_cast<Scalar>(sum_exp)};

  // Vectors need rows that are aligned alike. Where they are not, as in a slice of an odd
  // vocabulary, elements go one by one.
  const bool is_aligned_alike =
      (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 == 0;
  const RowCut<T> cut(x, args.V);

  // In place, another thread may have overwritten the label's logit: it is read, and its gradient
  // written last, by the thread that writes that element anyway.
  const bool writes_label =
      tid == (is_aligned_alike ? cut.thread_of_element(label, kThreads) : label % kThreads);
  const Scalar label_x = writes_label ? Elements<T>::widen(load(x + label)) : Scalar(0);

  if (is_aligned_alike) {
    const Vector16* vectors = cut.vectors(x);
    const int64_t num_vectors = cut.num_vectors();
    int64_t i = tid;
    for (; i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {
      write_vectors<T, Transform, kThreads, kUnroll, false>(vectors, cut.vectors(dx), i,
                                                            num_vectors, gradient);
    }
    if (i < num_vectors) {
      write_vectors<T, Transform, kThreads, kUnroll, true>(vectors, cut.vectors(dx), i, num_vectors,
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
    const Scalar label_z = transform.z(label_x);
    const double label_logp = LogSumExp<Scalar>{max, sum_exp}.log_probability(label_z);
    const double label_grad = static_cast<double>(common_grad) * one_minus_exp(label_logp);
    store(dx + label,
          Elements<T>::narrow(static_cast<Scalar>(label_grad) * transform.relative_slope(label_z)));
  }
}

// ---- launches: 0 or an error code -----------------------------------------------------------

template <typename T, class Transform, int kThreads, int kUnroll>
int launch_token_logps(const TokenLogpsArgs& args, Stream stream) {
  return launch(token_logps_kernel<T, Transform, kThreads, kUnroll>,
                grid_of_rows(args.targets.B * args.targets.T), dim3(kThreads), stream, args,
                Transform(args.transform));
}

template <typename T, class Transform, int kThreads, int kUnroll>
int launch_token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream) {
  return launch(token_logps_backward_kernel<T, Transform, kThreads, kUnroll>,
                grid_of_rows(args.targets.B * args.targets.T), dim3(kThreads), stream, args,
                Transform(args.transform));
}

// 16-byte loads a thread has under way at once. exp of a double leaves no registers for four.
template <typename T>
constexpr int kVectorsInFlight = sizeof(T) == 8 ? 2 : 4;

// From this many bytes on, a row keeps a large block busy.
constexpr int64_t kLargeRowBytes = 16384;

}  // namespace simpo_ext::cuda
