// Hidden states around the logits of a vocabulary that is worked on in parts: which tokens are
// rows, rows of hidden states and their gradient, and what goes to and comes from [B, T].
//
// Memory contract, with e the size of a hidden state's element and c that of compute:
//
//   select_tokens: each label is read once; 16 R bytes are written, and N c to logps if asked for.
//   gather_rows: 8 bytes a row are read, and H e where it has a token; R H e bytes are written.
//   write_logps: 8 bytes a row are read and, where it has a token, 8 + 2 c; then c are written. A
//   report adds 16 bytes read and 16 written.
//   put_label_gradients: 8 bytes a row are read; where the part has its label, c are read and e
//   written.
//   add_partial: count e bytes are read, and count c unless it is the first; count c are written.
//   hidden_gradient: 8 bytes a row are read and, where it has a token, its label, 8 bytes; then c
//   and H (2 e + c) bytes are read, or H 2 e without a sum, and H e written. Of a token whose label
//   is out of range only the row of NaN is written.
//
// No scratch. Every element has one writer and one order of additions: equal inputs give equal
// bits.

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace simpo_ext::cuda {
namespace {

// ---- which tokens are rows ------------------------------------------------------------------

// One block goes through all labels, so that the order of rows needs no second pass: at 4096 labels
// a turn, each a few dependent steps long, that takes some microseconds for a usual batch.
constexpr int kSelectThreads = 1024;
constexpr int kTokensPerThread = 4;
constexpr int64_t kTokensPerTurn = kSelectThreads * kTokensPerThread;

template <typename Scalar>
__global__ void __launch_bounds__(kSelectThreads) select_tokens_kernel(SelectTokensArgs args) {
  constexpr int kWarps = kSelectThreads / kWarpSize;
  static_assert(kWarps == kWarpSize, "a lane for the count of each warp");
  // For two turns: in one of them some threads may still read while others write in the next.
  SIMPO_SHARED(int, of_warps, 2 * kWarps);
  const Targets& targets = args.targets;
  const int64_t N = targets.B * targets.T;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kWarpSize, warp = tid / kWarpSize;
  Scalar* logps = static_cast<Scalar*>(args.logps);

  int64_t num_selected = 0;  // in the turns before
  int* counts = of_warps;
  for (int64_t first = 0; first < N; first += kTokensPerTurn) {
    const int64_t first_of_mine = first + tid * kTokensPerThread;
    int64_t labels[kTokensPerThread];
    Token token = token_of_row(first_of_mine, targets.T);
    SIMPO_UNROLL
    for (int k = 0; k < kTokensPerThread; ++k) {
      const bool has_label = first_of_mine + k < N && targets.has_label(token.t);
      labels[k] = has_label ? load(targets.labels + targets.label_offset(token.b, token.t))
                            : targets.ignore_index;
      token = token.t + 1 < targets.T ? Token{token.b, token.t + 1} : Token{token.b + 1, 0};
    }
    int count = 0;
    SIMPO_UNROLL
    for (int k = 0; k < kTokensPerThread; ++k) count += labels[k] != targets.ignore_index ? 1 : 0;

    const SumInWarp of_my_warp = add_in_warp(count);
    if (lane == 0) counts[warp] = of_my_warp.all;
    __syncthreads();
    const SumInWarp of_block = add_in_warp(counts[lane]);
    const int before = __shfl_sync(kWholeWarp, of_block.before, warp) + of_my_warp.before;

    int64_t row = num_selected + before;
    SIMPO_UNROLL
    for (int k = 0; k < kTokensPerThread; ++k) {
      const int64_t position = first_of_mine + k;
      const bool is_valid = labels[k] != targets.ignore_index;
      if (logps != nullptr && position < N) {
        store(logps + position, is_valid ? std::numeric_limits<Scalar>::quiet_NaN() : Scalar(0));
      }
      if (!is_valid) continue;
      if (row < args.R) {
        store(args.positions + row, position);
        store(args.labels + row, labels[k]);
      }
      ++row;
    }
    num_selected += of_block.all;
    counts = counts == of_warps ? of_warps + kWarps : of_warps;
  }
  for (int64_t row = num_selected + tid; row < args.R; row += kSelectThreads) {
    store(args.positions + row, int64_t{-1});
    store(args.labels + row, targets.ignore_index);
  }
}

// ---- a row for each thread ------------------------------------------------------------------

constexpr int kRowsPerBlock = 256;

inline dim3 grid_of_threads(int64_t R) {
  return grid_of_rows((R + kRowsPerBlock - 1) / kRowsPerBlock);
}

SIMPO_DEVICE int64_t row_of_thread() { return row_of_block() * kRowsPerBlock + threadIdx.x; }

template <typename Scalar>
__global__ void __launch_bounds__(kRowsPerBlock) write_logps_kernel(WriteLogpsArgs args) {
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const int64_t position = load(args.positions + row);
  if (position < 0) return;
  const LogSumExp<Scalar> logsumexp{load(static_cast<const Scalar*>(args.max) + row),
                                    load(args.sum_exp + row)};
  const Scalar label_z = load(static_cast<const Scalar*>(args.label_z) + row);
  store(static_cast<Scalar*>(args.logps) + position,
        static_cast<Scalar>(logsumexp.log_probability(label_z)));
  if (args.mean_logit == nullptr) return;
  const RowReport report{load(args.sum_z + row), load(args.sum_exp_z + row)};
  store(args.mean_logit + position, report.sum_z / static_cast<double>(args.num_labels));
  store(args.entropy + position, report.entropy(logsumexp.sum));
}

template <typename T>
__global__ void __launch_bounds__(kRowsPerBlock)
    put_label_gradients_kernel(PutLabelGradientsArgs args) {
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const int64_t label = load(args.labels + row);
  if (label == args.ignore_index || !is_in_part(label, args.first_label, args.V)) return;
  const Compute<T> value = load(static_cast<const Compute<T>*>(args.label_gradients) + row);
  store(static_cast<T*>(args.dlogits) + row * args.dlogits_stride + (label - args.first_label),
        Elements<T>::narrow(value));
}

// Whether there is anything to gather for a row: a token, with a gradient where it matters.
template <typename T, typename Load>
SIMPO_DEVICE bool has_part(const GatherRowsArgs& args, int64_t row, int64_t position,
                           const Load& load_gradient) {
  if (position < 0) return false;
  if (args.gradients == nullptr) return true;
  return load_gradient(static_cast<const Compute<T>*>(args.gradients) + row) != Compute<T>(0);
}

// Of rows no longer than a vector.
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

// ---- a block for each row -------------------------------------------------------------------

// With four 16-byte vectors for each thread: 8 KB, a row of 4096 2-byte elements.
constexpr int kRowThreads = 128;
constexpr int kRowBlocksPerSM = 8;  // leaves 64 registers a thread

// Copies vectors first, first + kRowThreads, ... of a row, kUnroll of them; with kGuarded as many
// as there are. All loads stand before the first store, so that they are in flight together.
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

// Compute values beside a vector of T: one vector of them, or two.
template <typename T>
struct Sums {
  using Scalar = Compute<T>;
  static constexpr int kVectors = sizeof(Scalar) / sizeof(T);
  static constexpr int kWidth = Elements<Scalar>::kWidth;
  Vector16 v[kVectors];

  // The vectors beside vector i. Two loads share a line, and the first-level cache has the second.
  SIMPO_DEVICE void load_from(const Vector16* sums, int64_t i) {
    SIMPO_UNROLL
    for (int j = 0; j < kVectors; ++j) v[j] = load_cached(sums + i * kVectors + j);
  }
  SIMPO_DEVICE Scalar get(int k) const { return Elements<Scalar>::get(v[k / kWidth], k % kWidth); }
};

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

// As copy_vectors.
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

SIMPO_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
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
constexpr int kAddBlocksPerSM = 6;  // leaves 40 registers a thread

// Vectors of a partial product that a thread has under way at once; with what they are added to,
// as many or twice as many more.
template <bool kIsFirst>
constexpr int kPartialsInFlight = kIsFirst ? 4 : 2;

// As copy_vectors.
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

int select_tokens(const SelectTokensArgs& args, Stream stream) {
  const bool has_logps = args.logps != nullptr && args.targets.B * args.targets.T > 0;
  if (args.R == 0 && !has_logps) return 0;
  int error = 0;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    error = launch(select_tokens_kernel<typename decltype(tag)::type>, dim3(1),
                   dim3(kSelectThreads), stream, args);
  });
  return error;
}

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

int write_logps(const WriteLogpsArgs& args, Stream stream) {
  if (args.R == 0) return 0;
  int error = 0;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    error = launch(write_logps_kernel<typename decltype(tag)::type>, grid_of_threads(args.R),
                   dim3(kRowsPerBlock), stream, args);
  });
  return error;
}

int put_label_gradients(const PutLabelGradientsArgs& args, Stream stream) {
  if (args.R * args.V == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    error = launch(put_label_gradients_kernel<typename decltype(tag)::type>,
                   grid_of_threads(args.R), dim3(kRowsPerBlock), stream, args);
  });
  return error;
}

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
