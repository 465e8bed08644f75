// The gradient of the hidden states, from the products of dlogits and weight.
//
// Memory contract, with e the size of an element and c that of a compute value:
//
//   add_partial: reads count e bytes, and count c bytes unless the product is the first; writes
//   count c bytes.
//   hidden_gradient: reads 8 bytes a row and, if the row has a token, the label, 8 bytes. Then it
//   reads c + H (2 e + c) bytes, or c + 2 H e without a sum, and writes H e bytes. If the label is
//   out of range, it only writes a row of NaN.
//
// No scratch. Every element has one writer and one order of additions, so equal inputs give equal
// bits.

#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/token_rows.cuh"

namespace simpo_ext::cuda {
namespace {

// ---- a block for each row -------------------------------------------------------------------

template <typename T>
struct HiddenGradientRow {
  using Scalar = Compute<T>;
  const T* partial;
  const Scalar* sum;
  const T* weight;
  int64_t weight_stride;
  T* dhidden;
  Scalar label_gradient;

  SIMPO_DEVICE Scalar of(Scalar sum_of_parts, Scalar weight_of_label) const {
    return sum_of_parts + label_gradient * weight_of_label;
  }
};

template <typename T, bool kHasSum>
SIMPO_DEVICE void write_hidden_element(const HiddenGradientRow<T>& row, int64_t h) {
  Compute<T> value = Elements<T>::widen(load(row.partial + h));
  if (kHasSum) value = load(row.sum + h) + value;
  store(row.dhidden + h, Elements<T>::narrow(row.of(
                             value, Elements<T>::widen(load(row.weight + h * row.weight_stride)))));
}

// Writes kUnroll vectors of a row: first, first + kRowThreads, ...; with kGuarded, only those that
// exist. All loads come before the first store, so that they are in flight together.
template <typename T, bool kHasSum, int kUnroll, bool kGuarded>
SIMPO_DEVICE void write_hidden_vectors(const HiddenGradientRow<T>& row, int64_t first,
                                       int64_t num_vectors) {
  constexpr int kWidth = Elements<T>::kWidth;
  Vector16 partial[kUnroll], weight[kUnroll];
  Sums<T> sums[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kRowThreads;
    if (kGuarded && i >= num_vectors) break;
    partial[u] = load_streaming(reinterpret_cast<const Vector16*>(row.partial) + i);
    weight[u] = load_streaming(reinterpret_cast<const Vector16*>(row.weight) + i);
    if (kHasSum) sums[u].load_from(reinterpret_cast<const Vector16*>(row.sum), i);
  }
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kRowThreads;
    if (kGuarded && i >= num_vectors) break;
    Compute<T> values[kWidth];
    SIMPO_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      Compute<T> value = Elements<T>::get(partial[u], k);
      if (kHasSum) value = sums[u].get(k) + value;
      values[k] = row.of(value, Elements<T>::get(weight[u], k));
    }
    store_streaming(reinterpret_cast<Vector16*>(row.dhidden) + i, Elements<T>::pack(values));
  }
}

template <typename T, bool kHasSum>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM)
    hidden_gradient_kernel(HiddenGradientArgs args) {
  using Scalar = Compute<T>;
  constexpr int kUnroll = 2;
  const int64_t i = row_of_block();
  if (i >= args.R) return;
  const int64_t position = load_uniform(args.positions + i);
  if (position < 0) return;
  T* dhidden = static_cast<T*>(args.dhidden) + position * args.H;
  const int64_t label = load_uniform(args.labels + i);
  if (!is_in_vocabulary(label, args.num_labels)) {
    fill_row<T, kRowThreads>(dhidden, args.H, std::numeric_limits<Scalar>::quiet_NaN());
    return;
  }
  const HiddenGradientRow<T> row{
      static_cast<const T*>(args.partial) + i * args.H,
      kHasSum ? static_cast<const Scalar*>(args.sum) + i * args.H : nullptr,
      static_cast<const T*>(args.weight) + label * args.weight_stride_v,
      args.weight_stride_h,
      dhidden,
      load_uniform(static_cast<const Scalar*>(args.label_gradients) + i)};
  const int64_t tid = threadIdx.x;

  const bool has_vectors = row.weight_stride == 1 && is_aligned(row.partial) &&
                           is_aligned(row.sum) && is_aligned(row.weight) && is_aligned(dhidden);
  const int64_t num_vectors = has_vectors ? args.H / Elements<T>::kWidth : 0;
  int64_t v = tid;
  for (; v + (kUnroll - 1) * kRowThreads < num_vectors; v += kUnroll * kRowThreads) {
    write_hidden_vectors<T, kHasSum, kUnroll, false>(row, v, num_vectors);
  }
  if (v < num_vectors) write_hidden_vectors<T, kHasSum, kUnroll - 1, true>(row, v, num_vectors);
  for (int64_t h = num_vectors * Elements<T>::kWidth + tid; h < args.H; h += kRowThreads) {
    write_hidden_element<T, kHasSum>(row, h);
  }
}

// ---- elements -------------------------------------------------------------------------------

constexpr int kAddThreads = 256;
constexpr int kAddBlocksPerSM = 6;  // 40 registers for each thread

// The number of a product's vectors that a thread has in flight. The sum has as many vectors, or
// twice as many.
template <bool kIsFirst>
constexpr int kPartialsInFlight = kIsFirst ? 4 : 2;

// Adds vectors first, first + kAddThreads, ..., like write_hidden_vectors.
template <typename T, bool kIsFirst, bool kGuarded>
SIMPO_DEVICE void add_partial_vectors(const Vector16* partial, Vector16* sum, int64_t first,
                                      int64_t num_vectors) {
  using Scalar = Compute<T>;
  constexpr int kUnroll = kPartialsInFlight<kIsFirst>;
  constexpr int kWidth = Sums<T>::kWidth;
  Vector16 v[kUnroll];
  Sums<T> sums[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kAddThreads;
    if (kGuarded && i >= num_vectors) break;
    v[u] = load_streaming(partial + i);
    if (!kIsFirst) sums[u].load_from(sum, i);
  }
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kAddThreads;
    if (kGuarded && i >= num_vectors) break;
    SIMPO_UNROLL
    for (int j = 0; j < Sums<T>::kVectors; ++j) {
      Scalar values[kWidth];
      SIMPO_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        values[k] = Elements<T>::get(v[u], j * kWidth + k);
        if (!kIsFirst) values[k] = sums[u].get(j * kWidth + k) + values[k];
      }
      store_streaming(sum + i * Sums<T>::kVectors + j, Elements<Scalar>::pack(values));
    }
  }
}

template <typename T, bool kIsFirst>
constexpr int64_t kElementsPerBlock =
    kAddThreads * kPartialsInFlight<kIsFirst> * Elements<T>::kWidth;

template <typename T, bool kIsFirst>
__global__ void __launch_bounds__(kAddThreads, kAddBlocksPerSM)
    add_partial_kernel(AddPartialArgs args) {
  using Scalar = Compute<T>;
  constexpr int kWidth = Elements<T>::kWidth;
  constexpr int64_t kElements = kElementsPerBlock<T, kIsFirst>;
  const int64_t begin = row_of_block() * kElements;
  if (begin >= args.count) return;
  const int64_t end = begin + kElements < args.count ? begin + kElements : args.count;
  const T* partial = static_cast<const T*>(args.partial);
  Scalar* sum = static_cast<Scalar*>(args.sum);
  const int64_t tid = threadIdx.x;

  int64_t done = begin;
  if (is_aligned(partial) && is_aligned(sum)) {
    const Vector16* vectors = reinterpret_cast<const Vector16*>(partial + begin);
    Vector16* sums = reinterpret_cast<Vector16*>(sum + begin);
    const int64_t num_vectors = (end - begin) / kWidth;
    if (end - begin == kElements) {
      add_partial_vectors<T, kIsFirst, false>(vectors, sums, tid, num_vectors);
    } else {
      add_partial_vectors<T, kIsFirst, true>(vectors, sums, tid, num_vectors);
    }
    done += num_vectors * kWidth;
  }
  for (int64_t i = done + tid; i < end; i += kAddThreads) {
    const Scalar value = Elements<T>::widen(load(partial + i));
    store(sum + i, kIsFirst ? value : load(sum + i) + value);
  }
}

template <typename T, bool kIsFirst>
int launch_add_partial(const AddPartialArgs& args, Stream stream) {
  constexpr int64_t kElements = kElementsPerBlock<T, kIsFirst>;
  return launch(add_partial_kernel<T, kIsFirst>,
                grid_of_rows((args.count + kElements - 1) / kElements), dim3(kAddThreads), stream,
                args);
}

}  // namespace

int add_partial(const AddPartialArgs& args, Stream stream) {
  if (args.count == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = args.is_first ? launch_add_partial<T, true>(args, stream)
                          : launch_add_partial<T, false>(args, stream);
  });
  return error;
}

int hidden_gradient(const HiddenGradientArgs& args, Stream stream) {
  if (args.R * args.H == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = args.sum != nullptr ? launch(hidden_gradient_kernel<T, true>, grid_of_rows(args.R),
                                         dim3(kRowThreads), stream, args)
                                : launch(hidden_gradient_kernel<T, false>, grid_of_rows(args.R),
                                         dim3(kRowThreads), stream, args);
  });
  return error;
}

}  // namespace simpo_ext::cuda
