// The preference loss on the GPU.
//
// Memory contract: the forward reads each valid token log-prob once and writes O(S + P) values. The
// backward reads labels, and O(P) values in each block, and writes [B, T].
//
// The forward has two kernels. The first has a block for each sequence, so that the whole GPU works
// on the tokens. The second has one block, which adds up the pairs in a fixed order without
// atomics. For the same reason, if pairs are given by indices, each sequence in the backward
// searches all pairs for its own.

#include <cstdint>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/preference.h"
#include "cuda/sequence_sums.cuh"

namespace simpo_ext::cuda {
namespace {

constexpr int kPairThreads = 128;
// For the backward. Each block counts all pairs, so more blocks than fill a GPU do not pay off.
constexpr int64_t kMaxBackwardBlocks = 1024;

template <typename Scalar>
__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    sum_sequences_kernel(PreferenceLossArgs args) {
  const int64_t s = row_of_block();
  if (s >= args.sequences.S) return;
  const SequenceSum total = sum_valid_tokens<Scalar, kSequenceThreads>(
      static_cast<const Scalar*>(args.token_logps), args.token_strides, args.targets,
      find_range(args.sequences, args.targets, s));
  if (threadIdx.x == 0) {
    store(args.sums + s, total.sum);
    store(args.counts + s, total.count);
  }
}

// The sequences of a pair, and its weight. A sequence that does not exist is -1.
struct PairMembers {
  int64_t chosen, rejected;
  double weight;
};

SIMPO_DEVICE PairMembers members_of(const Pairs& pairs, int64_t S, int64_t p) {
  const double weight = pairs.weights == nullptr ? 1.0 : load(pairs.weights + p);
  if (pairs.indices == nullptr) return {p, pairs.P + p, weight};
  const auto found = [S](int64_t sequence) {
    return sequence >= 0 && sequence < S ? sequence : int64_t{-1};
  };
  return {found(load(pairs.indices + 2 * p)), found(load(pairs.indices + 2 * p + 1)), weight};
}

template <typename Scalar>
__global__ void __launch_bounds__(kPairThreads) score_pairs_kernel(PreferenceLossArgs args) {
  constexpr int kWords = kWordsOf<PreferenceTotals>;
  SIMPO_SHARED(uint64_t, of_threads, kPairThreads* kWords);
  const int64_t P = args.pairs.P;
  const int tid = static_cast<int>(threadIdx.x);
  const auto sum_of = [&](int64_t s) {
    return s < 0 ? sum_of_nowhere() : SequenceSum{load(args.sums + s), load(args.counts + s)};
  };

  PreferenceTotals totals;
  for (int64_t p = tid; p < P; p += kPairThreads) {
    const PairMembers members = members_of(args.pairs, args.sequences.S, p);
    const ScoredPair pair =
        score_pair(sum_of(members.chosen), sum_of(members.rejected), members.weight, args);
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

SIMPO_DEVICE int64_t count_of(const PreferenceLossBackwardArgs& args, int64_t s) {
  return s < 0 ? sum_of_nowhere().count : load(args.counts + s);
}

// The counts over all pairs, in every thread.
SIMPO_DEVICE PairCounts count_pairs(const PreferenceLossBackwardArgs& args) {
  constexpr int kWarps = kSequenceThreads / kWarpSize;
  SIMPO_SHARED(int64_t, num_pairs, kWarps);
  SIMPO_SHARED(int64_t, num_chosen_tokens, kWarps);
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  PairCounts mine;
  for (int64_t p = threadIdx.x; p < args.pairs.P; p += kSequenceThreads) {
    const PairMembers members = members_of(args.pairs, args.sequences.S, p);
    mine.add(count_of(args, members.chosen), count_of(args, members.rejected),
             args.reduction.empty);
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

// The gradient of each valid token of sequence s, in every thread: from the sequence's pair, or
// from all pairs whose indices have the sequence.
template <typename Scalar>
SIMPO_DEVICE double sequence_gradient(const PreferenceLossBackwardArgs& args,
                                      const PairCounts& totals, int64_t s) {
  constexpr int kWarps = kSequenceThreads / kWarpSize;
  SIMPO_SHARED(double, of_warps, kWarps);
  const int64_t P = args.pairs.P;
  if (P == 0) return 0.0;  // without pairs, indices may be null even if given
  if (args.pairs.indices == nullptr) {
    const int64_t p = s < P ? s : s - P;
    const double weight =
        args.pairs.weights == nullptr ? 1.0 : load_uniform(args.pairs.weights + p);
    const TokenGradients gradients = pair_gradients<Scalar>(
        p, load_uniform(args.counts + p), load_uniform(args.counts + P + p), weight, totals, args);
    return s < P ? gradients.chosen : gradients.rejected;
  }
  double sum = 0.0;
  for (int64_t p = threadIdx.x; p < P; p += kSequenceThreads) {
    const PairMembers members = members_of(args.pairs, args.sequences.S, p);
    if (members.chosen != s && members.rejected != s) continue;
    const TokenGradients gradients =
        pair_gradients<Scalar>(p, count_of(args, members.chosen), count_of(args, members.rejected),
                               members.weight, totals, args);
    if (members.chosen == s) sum += gradients.chosen;
    if (members.rejected == s) sum += gradients.rejected;
  }
  sum = reduce_warp(sum, [](double a, double b) { return a + b; });
  __syncthreads();  // all threads have read of_warps for the previous sequence
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  sum = 0.0;
  for (int i = 0; i < kWarps; ++i) sum += of_warps[i];
  return sum;
}

template <typename Scalar>
__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    preference_loss_backward_kernel(PreferenceLossBackwardArgs args) {
  const PairCounts totals = count_pairs(args);
  for (int64_t s = blockIdx.x; s < args.sequences.S; s += gridDim.x) {
    spread_to_valid_tokens(sequence_gradient<Scalar>(args, totals, s), args.targets,
                           find_range(args.sequences, args.targets, s).range,
                           static_cast<Scalar*>(args.grad_token_logps));
  }
}

template <typename Scalar>
int forward(const PreferenceLossArgs& args, Stream stream) {
  if (args.sequences.S > 0) {
    const int error = launch(sum_sequences_kernel<Scalar>, grid_of_rows(args.sequences.S),
                             dim3(kSequenceThreads), stream, args);
    if (error != 0) return error;
  }
  return launch(score_pairs_kernel<Scalar>, dim3(1), dim3(kPairThreads), stream, args);
}

template <typename Scalar>
int backward(const PreferenceLossBackwardArgs& args, Stream stream) {
  if (args.sequences.S * args.targets.T == 0) return 0;
  const unsigned z = blocks_per_sequence(args.targets.T);
  int64_t x = kMaxBackwardBlocks / z;
  if (x > args.sequences.S) x = args.sequences.S;
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
