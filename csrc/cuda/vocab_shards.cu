// A sharded vocabulary: merges the shards of each row, and completes the gradient of the hidden
// states before and after the sum over shards.
//
// Memory contract, with e the size of a hidden state's element and c that of a compute value:
//
//   merge_shards: reads a row's label. Unless the row is masked, it reads 24 bytes a shard, and the
//   row's position, 8 bytes, if there are positions. It writes 8 + 2 c bytes, or 8 + c for a masked
//   row if there are positions.
//   add_label_shares: reads 8 bytes a row. If the shard has the row's label, it reads c and H (e +
//   c) bytes and writes H c bytes. scatter_rows: reads 8 bytes a row. If the row has a token, it
//   reads H c bytes and writes H e bytes.
//
// No scratch. Every element has one writer, and the shards of a row have a fixed order, so equal
// inputs give equal bits.

#include <cstdint>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"

namespace simpo_ext::cuda {
namespace {

// ---- a row for each thread ------------------------------------------------------------------

constexpr int kMergeThreads = 128;
constexpr int kShardsInFlight = 4;  // a thread waits for memory once for four shards

template <typename Scalar>
__global__ void __launch_bounds__(kMergeThreads) merge_shards_kernel(MergeShardsArgs args) {
  const Targets& targets = args.targets;
  const int64_t N = targets.B * targets.T;
  const int64_t row = row_of_block() * kMergeThreads + threadIdx.x;
  if (row >= N) return;
  const Token token = token_of_row(row, targets.T);
  const bool is_masked =
      !targets.has_label(token.t) ||
      load(targets.labels + targets.label_offset(token.b, token.t)) == targets.ignore_index;
  Scalar logp = 0;
  LogSumExp<Scalar> logsumexp{0, 0.0};
  if (!is_masked) {
    ShardedRow<Scalar> sharded;
    for (int64_t first = 0; first < args.K; first += kShardsInFlight) {
      double shards[kShardsInFlight][3];
      SIMPO_UNROLL
      for (int u = 0; u < kShardsInFlight; ++u) {
        if (first + u >= args.K) break;
        const double* shard = args.shards + 3 * (first + u) * N + row;
        SIMPO_UNROLL
        for (int i = 0; i < 3; ++i) shards[u][i] = load(shard + i * N);
      }
      SIMPO_UNROLL
      for (int u = 0; u < kShardsInFlight; ++u) {
        if (first + u >= args.K) break;
        sharded.add(shards[u][0], shards[u][1], shards[u][2]);
      }
    }
    logp = static_cast<Scalar>(sharded.logp());
    logsumexp = sharded.logsumexp;
  }
  if (args.positions == nullptr) {
    store(static_cast<Scalar*>(args.logps) + row, logp);
  } else if (!is_masked) {
    store(static_cast<Scalar*>(args.logps) + load(args.positions + row), logp);
  }
  store(static_cast<Scalar*>(args.max) + row, logsumexp.max);
  store(args.sum_exp + row, logsumexp.sum);
}

// ---- a block for each row -------------------------------------------------------------------

constexpr int kRowThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kRowThreads) add_label_shares_kernel(AddLabelSharesArgs args) {
  using Scalar = Compute<T>;
  const int64_t i = row_of_block();
  if (i >= args.R) return;
  const int64_t label = load_uniform(args.labels + i);
  if (label == args.ignore_index || !is_in_part(label, args.first_label, args.V)) return;
  const Scalar gradient = load_uniform(static_cast<const Scalar*>(args.label_gradients) + i);
  const T* weight =
      static_cast<const T*>(args.weight) + (label - args.first_label) * args.weight_stride_v;
  Scalar* sum = static_cast<Scalar*>(args.sum) + i * args.H;
  for (int64_t h = threadIdx.x; h < args.H; h += kRowThreads) {
    const Scalar of_label = gradient * Elements<T>::widen(load(weight + h * args.weight_stride_h));
    store(sum + h, load(sum + h) + of_label);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) scatter_rows_kernel(ScatterRowsArgs args) {
  const int64_t i = row_of_block();
  if (i >= args.R) return;
  const int64_t position = load_uniform(args.positions + i);
  if (position < 0) return;
  const Compute<T>* row = static_cast<const Compute<T>*>(args.rows) + i * args.H;
  T* to = static_cast<T*>(args.to) + position * args.H;
  for (int64_t h = threadIdx.x; h < args.H; h += kRowThreads) {
    store(to + h, Elements<T>::narrow(load(row + h)));
  }
}

}  // namespace

int merge_shards(const MergeShardsArgs& args, Stream stream) {
  const int64_t N = args.targets.B * args.targets.T;
  if (N == 0) return 0;
  int error = 0;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    error = launch(merge_shards_kernel<typename decltype(tag)::type>,
                   grid_of_rows((N + kMergeThreads - 1) / kMergeThreads), dim3(kMergeThreads),
                   stream, args);
  });
  return error;
}

int add_label_shares(const AddLabelSharesArgs& args, Stream stream) {
  if (args.R * args.H == 0 || args.V == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    error = launch(add_label_shares_kernel<typename decltype(tag)::type>, grid_of_rows(args.R),
                   dim3(kRowThreads), stream, args);
  });
  return error;
}

int scatter_rows(const ScatterRowsArgs& args, Stream stream) {
  if (args.R * args.H == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    error = launch(scatter_rows_kernel<typename decltype(tag)::type>, grid_of_rows(args.R),
                   dim3(kRowThreads), stream, args);
  });
  return error;
}

}  // namespace simpo_ext::cuda
