// The preference loss on the GPU.
//
// Memory contract: the forward reads each valid token log-prob once and writes O(P); the backward
// reads labels and O(P) a block, and writes [2P, T].
//
// The forward is two kernels: a block for each sequence, which uses the whole GPU for the [2P, T]
// part, and one block for the O(P) rest, which needs no atomics to add up the pairs in a fixed
// order.

#include <cstdint>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/preference.h"
#include "cuda/sequence_sums.cuh"

namespace simpo_ext::cuda {
namespace {

constexpr int kPairThreads = 128;
// Of the backward. Each block counts the pairs anew, so more blocks than fill a GPU are not worth
// it.
constexpr int64_t kMaxBackwardBlocks = 1024;

template <typename Scalar>
__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    sum_sequences_kernel(PreferenceLossArgs args) {
  const int64_t b = row_of_block();
  if (b >= args.targets.B) return;
  const SequenceSum total = sum_valid_tokens<Scalar, kSequenceThreads>(
      static_cast<const Scalar*>(args.token_logps), args.token_strides, args.targets, b);
  if (threadIdx.x == 0) {
    store(args.sums + b, total.sum);
    store(args.counts + b, total.count);
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kPairThreads) score_pairs_kernel(PreferenceLossArgs args) {
  constexpr int kWords = kWordsOf<PreferenceTotals>;
  SIMPO_SHARED(uint64_t, of_threads, kPairThreads* kWords);
  const int64_t P = args.targets.B / 2;
  const int tid = static_cast<int>(threadIdx.x);

  PreferenceTotals totals;
  for (int64_t p = tid; p < P; p += kPairThreads) {
    const ScoredPair pair = score_pair({load(args.sums + p), load(args.counts + p)},
                                       {load(args.sums + P + p), load(args.counts + P + p)}, args);
    write_pair<Scalar>(pair, p, P, args);
    totals.add(pair);
  }
  for (int distance = kPairThreads / 2; distance > 0; distance /= 2) {
    put_words(totals, of_threads + tid * kWords);
    __syncthreads();
    if (tid < distance) {
      totals.merge(from_words<PreferenceTotals>(of_threads + (tid + distance) * kWords));
    }
    __syncthreads();
  }
  if (tid == 0) write_totals<Scalar>(totals, P, args);
}

// Over all pairs, in every thread.
SIMPO_DEVICE PairCounts count_pairs(const PreferenceLossBackwardArgs& args) {
  constexpr int kWarps = kSequenceThreads / kWarpSize;
  SIMPO_SHARED(int64_t, num_pairs, kWarps);
  SIMPO_SHARED(int64_t, num_chosen_tokens, kWarps);
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  const int64_t P = args.targets.B / 2;
  PairCounts mine;
  for (int64_t p = threadIdx.x; p < P; p += kSequenceThreads) {
    mine.add(load(args.counts + p), load(args.counts + P + p), args.reduction.empty);
  }
  mine = {reduce_warp(mine.num_pairs, add), reduce_warp(mine.num_chosen_tokens, add)};
  if (threadIdx.x % kWarpSize == 0) {
    num_pairs[threadIdx.x / kWarpSize] = mine.num_pairs;
    num_chosen_tokens[threadIdx.x / kWarpSize] = mine.num_chosen_tokens;
  }
  __syncthreads();
  PairCounts totals;
  for (int i = 0; i < kWarps; ++i) {
    totals.num_pairs += num_pairs[i];
    totals.num_chosen_tokens += num_chosen_tokens[i];
  }
  return totals;
}

template <typename Scalar>
__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    preference_loss_backward_kernel(PreferenceLossBackwardArgs args) {
  const int64_t P = args.targets.B / 2;
  const PairCounts totals = count_pairs(args);
  for (int64_t b = blockIdx.x; b < 2 * P; b += gridDim.x) {
    const TokenGradients gradients = pair_gradients<Scalar>(b < P ? b : b - P, P, totals, args);
    spread_to_valid_tokens(b < P ? gradients.chosen : gradients.rejected, args.targets, b,
                           static_cast<Scalar*>(args.grad_token_logps));
  }
}

template <typename Scalar>
int forward(const PreferenceLossArgs& args, Stream stream) {
  if (args.targets.B > 0) {
    const int error = launch(sum_sequences_kernel<Scalar>, grid_of_rows(args.targets.B),
                             dim3(kSequenceThreads), stream, args);
    if (error != 0) return error;
  }
  return launch(score_pairs_kernel<Scalar>, dim3(1), dim3(kPairThreads), stream, args);
}

template <typename Scalar>
int backward(const PreferenceLossBackwardArgs& args, Stream stream) {
  if (args.targets.B * args.targets.T == 0) return 0;
  const unsigned z = blocks_per_sequence(args.targets.T);
  int64_t x = kMaxBackwardBlocks / z;
  if (x > args.targets.B) x = args.targets.B;
  if (x > kMaxGridX) x = kMaxGridX;
  return launch(preference_loss_backward_kernel<Scalar>, dim3(static_cast<unsigned>(x), 1, z),
                dim3(kSequenceThreads), stream, args);
}

}  // namespace

int preference_loss(const PreferenceLossArgs& args, Stream stream) {
  int error = 0;
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { error = forward<typename decltype(tag)::type>(args, stream); });
  return error;
}

int preference_loss_backward(const PreferenceLossBackwardArgs& args, Stream stream) {
  int error = 0;
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { error = backward<typename decltype(tag)::type>(args, stream); });
  return error;
}

}  // namespace simpo_ext::cuda
