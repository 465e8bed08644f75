// gather_rows copies tokens to rows. It reads 8 bytes a row and, if the row has a token, H e bytes,
// with e the size of an element. It writes R H e bytes.
//
// No scratch. Every element has one writer.

#include <cstdint>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/token_rows.cuh"

namespace simpo_ext::cuda {
namespace {

// Whether the row has a token and, if gradients are given, a gradient that is not 0.
template <typename T, typename Load>
SIMPO_DEVICE bool has_part(const GatherRowsArgs& args, int64_t row, int64_t position,
                           const Load& load_gradient) {
  if (position < 0) return false;
  if (args.gradients == nullptr) return true;
  return load_gradient(static_cast<const Compute<T>*>(args.gradients) + row) != Compute<T>(0);
}

// A thread for each row, for rows that are not longer than a vector.
template <typename T>
__global__ void __launch_bounds__(kRowsPerBlock) gather_short_rows_kernel(GatherRowsArgs args) {
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const int64_t position = load(args.positions + row);
  T* to = static_cast<T*>(args.rows) + row * args.H;
  if (!has_part<T>(args, row, position, [](const auto* gradient) { return load(gradient); })) {
    for (int64_t h = 0; h < args.H; ++h) store(to + h, T{});
    return;
  }
  const Token token = token_of_row(position, args.T);
  const T* from = static_cast<const T*>(args.source) + args.source_strides.offset(token.b, token.t);
  for (int64_t h = 0; h < args.H; ++h) store(to + h, load(from + h));
}

// Copies kUnroll vectors of a row: first, first + kRowThreads, ...; with kGuarded, only those that
// exist. All loads come before the first store, so that they are in flight together.
template <int kUnroll, bool kGuarded>
SIMPO_DEVICE void copy_vectors(const Vector16* from, Vector16* to, int64_t first,
                               int64_t num_vectors) {
  Vector16 v[kUnroll];
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kRowThreads;
    if (!kGuarded || i < num_vectors) v[u] = load_streaming(from + i);
  }
  SIMPO_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kRowThreads;
    if (!kGuarded || i < num_vectors) store_streaming(to + i, v[u]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM)
    gather_rows_kernel(GatherRowsArgs args) {
  constexpr int kUnroll = 4;
  const int64_t row = row_of_block();
  if (row >= args.R) return;
  const int64_t position = load_uniform(args.positions + row);
  T* to = static_cast<T*>(args.rows) + row * args.H;
  const auto load_gradient = [](const auto* gradient) { return load_uniform(gradient); };
  if (!has_part<T>(args, row, position, load_gradient)) {
    fill_row<T, kRowThreads>(to, args.H, 0);
    return;
  }
  const Token token = token_of_row(position, args.T);
  const T* from = static_cast<const T*>(args.source) + args.source_strides.offset(token.b, token.t);
  const int64_t tid = threadIdx.x;

  if ((reinterpret_cast<uintptr_t>(from) - reinterpret_cast<uintptr_t>(to)) % 16 != 0) {
    for (int64_t h = tid; h < args.H; h += kRowThreads) store(to + h, load(from + h));
    return;
  }
  const RowCut<T> cut(from, args.H);
  const int64_t num_vectors = cut.num_vectors();
  int64_t i = tid;
  for (; i + (kUnroll - 1) * kRowThreads < num_vectors; i += kUnroll * kRowThreads) {
    copy_vectors<kUnroll, false>(cut.vectors(from), cut.vectors(to), i, num_vectors);
  }
  if (i < num_vectors) {
    copy_vectors<kUnroll - 1, true>(cut.vectors(from), cut.vectors(to), i, num_vectors);
  }
  if (tid < cut.num_edges()) {
    const int64_t element = cut.element_of_edge(tid);
    store(to + element, load(from + element));
  }
}

}  // namespace

int gather_rows(const GatherRowsArgs& args, Stream stream) {
  if (args.R * args.H == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.H <= Elements<T>::kWidth) {
      error = launch(gather_short_rows_kernel<T>, grid_of_threads(args.R), dim3(kRowsPerBlock),
                     stream, args);
    } else {
      error = launch(gather_rows_kernel<T>, grid_of_rows(args.R), dim3(kRowThreads), stream, args);
    }
  });
  return error;
}

}  // namespace simpo_ext::cuda
