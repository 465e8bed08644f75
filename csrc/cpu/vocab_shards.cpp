// A sharded vocabulary, on the CPU: merges the shards of each row, and completes the gradient of
// the hidden states before and after the sum over shards.
//
// Memory contract: merge_shards reads the label of each row and, unless it is masked, 24 bytes a
// shard. add_label_shares reads the label of each row and, if the shard has it, the label's row of
// the weight, and updates the row of the sum. scatter_rows reads and writes each row with a token
// once. Nothing is allocated.

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "cpu/tasks.h"

namespace simpo_ext::cpu {

void merge_shards(const MergeShardsArgs& args) {
  const Targets& targets = args.targets;
  const int64_t N = targets.B * targets.T;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    using Scalar = typename decltype(tag)::type;
    Scalar* logps = static_cast<Scalar*>(args.logps);
    Scalar* max = static_cast<Scalar*>(args.max);
    for (int64_t row = 0; row < N; ++row) {
      if (!targets.is_valid(row / targets.T, row % targets.T)) {
        if (args.positions == nullptr) logps[row] = Scalar(0);
        max[row] = Scalar(0);
        args.sum_exp[row] = 0.0;
        continue;
      }
      ShardedRow<Scalar> sharded;
      for (int64_t k = 0; k < args.K; ++k) {
        const double* shard = args.shards + 3 * k * N + row;
        sharded.add(shard[0], shard[N], shard[2 * N]);
      }
      logps[args.positions == nullptr ? row : args.positions[row]] =
          static_cast<Scalar>(sharded.logp());
      max[row] = sharded.logsumexp.max;
      args.sum_exp[row] = sharded.logsumexp.sum;
    }
  });
}

void add_label_shares(const AddLabelSharesArgs& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Scalar = Compute<T>;
    const Scalar* label_gradients = static_cast<const Scalar*>(args.label_gradients);
    for_each_in_runs(parallel_for, args.R, args.H, [&](int64_t i) {
      const int64_t column = args.labels[i] - args.first_label;
      if (args.labels[i] == args.ignore_index || column < 0 || column >= args.V) return;
      const T* weight = static_cast<const T*>(args.weight) + column * args.weight_stride_v;
      Scalar* sum = static_cast<Scalar*>(args.sum) + i * args.H;
      for (int64_t h = 0; h < args.H; ++h) {
        sum[h] += label_gradients[i] * widen(weight[h * args.weight_stride_h]);
      }
    });
  });
}

void scatter_rows(const ScatterRowsArgs& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_in_runs(parallel_for, args.R, args.H, [&](int64_t i) {
      if (args.positions[i] < 0) return;
      const Compute<T>* row = static_cast<const Compute<T>*>(args.rows) + i * args.H;
      T* to = static_cast<T*>(args.to) + args.positions[i] * args.H;
      for (int64_t h = 0; h < args.H; ++h) to[h] = narrow<T>(row[h]);
    });
  });
}

}  // namespace simpo_ext::cpu
