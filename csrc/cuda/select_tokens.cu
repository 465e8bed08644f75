// select_tokens lists the valid tokens as rows, in the order of their positions. It reads each
// label once and writes 16 R bytes. If logps are given, it writes c bytes for each position, with c
// the size of a compute value. No scratch.

#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace simpo_ext::cuda {
namespace {

// One block goes through all labels, so that the order of rows needs no second pass. It takes 4096
// labels a turn, and some microseconds for a usual batch.
constexpr int kSelectThreads = 1024;
constexpr int kTokensPerThread = 4;
constexpr int64_t kTokensPerTurn = kSelectThreads * kTokensPerThread;

template <typename Scalar>
__global__ void __launch_bounds__(kSelectThreads) select_tokens_kernel(SelectTokensArgs args) {
  constexpr int kWarps = kSelectThreads / kWarpSize;
  static_assert(kWarps == kWarpSize, "a lane for the count of each warp");
  // Two sets of counts, because some threads may still read those of one turn while others write
  // those of the next.
  SIMPO_SHARED(int, of_warps, 2 * kWarps);
  const Targets& targets = args.targets;
  const int64_t N = targets.B * targets.T;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kWarpSize, warp = tid / kWarpSize;
  Scalar* logps = static_cast<Scalar*>(args.logps);

  int64_t num_selected = 0;  // in earlier turns
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

}  // namespace simpo_ext::cuda
