// Sums over the valid tokens of a sequence, and the gradients of these tokens. Each sequence has a
// block, which reads each valid token once and no masked one. Sums are compensated, in double, in a
// fixed order.
#pragma once

#include <cstdint>

#include "core/compensated_sum.h"
#include "core/preference.h"
#include "core/views.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace simpo_ext::cuda {

// With four blocks on a multiprocessor, each thread has 64 registers, which is enough for all
// kernels here.
constexpr int kSequenceThreads = 256;
constexpr int kSequenceBlocksPerSM = 4;

SIMPO_DEVICE bool is_valid_token(const Targets& targets, int64_t b, int64_t t) {
  return targets.has_label(t) &&
         load(targets.labels + targets.label_offset(b, t)) != targets.ignore_index;
}

// The positions of sequence s, which is not found if they are not in the batch.
struct FoundRange {
  TokenRange range;
  bool is_found;
};

SIMPO_DEVICE FoundRange find_range(const Sequences& sequences, const Targets& targets, int64_t s) {
  if (sequences.cu_seqlens == nullptr) return {{s, 0, targets.T}, true};
  const int64_t begin = load_uniform(sequences.cu_seqlens + s);
  const int64_t end = load_uniform(sequences.cu_seqlens + s + 1);
  const bool is_found = begin >= 0 && begin <= end && end <= targets.T;
  if (!is_found) return {{0, 0, 0}, false};
  return {{0, begin, end}, true};
}

struct PartialSum {
  CompensatedSum<double> sum;
  int64_t count = 0;
};

// The sum over the valid tokens of a sequence, in thread 0.
template <typename Scalar, int kThreads>
SIMPO_DEVICE SequenceSum sum_valid_tokens(const Scalar* token_logps, TokenStrides strides,
                                          const Targets& targets, FoundRange found) {
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kWords = kWordsOf<PartialSum>;
  SIMPO_SHARED(uint64_t, of_warps, kWarps* kWords);
  const auto merge = [](PartialSum a, const PartialSum& other) {
    a.sum.merge(other.sum);
    a.count += other.count;
    return a;
  };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  const auto [b, begin, end] = found.range;
  PartialSum partial;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (!is_valid_token(targets, b, t)) continue;
    partial.sum.add(static_cast<double>(load(token_logps + strides.offset(b, t))));
    ++partial.count;
  }
  partial = reduce_warp_of_structs(partial, merge);
  if (lane == 0) put_words(partial, of_warps + warp * kWords);
  __syncthreads();

  if (threadIdx.x == 0) {
    for (int i = 1; i < kWarps; ++i) {
      partial = merge(partial, from_words<PartialSum>(of_warps + i * kWords));
    }
  }
  if (!found.is_found) return sum_of_nowhere();
  return {partial.sum.value(), partial.count};
}

// The number of blocks that share a sequence in spread_to_valid_tokens.
inline unsigned blocks_per_sequence(int64_t T) {
  constexpr int64_t kTokensPerBlock = 4 * kSequenceThreads, kMaxBlocks = 64;
  const int64_t blocks = (T + kTokensPerBlock - 1) / kTokensPerBlock;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// grad_token_logps = gradient at valid positions, and 0 at masked ones even if gradient is NaN. The
// blocks along gridDim.z share the positions.
template <typename Scalar>
SIMPO_DEVICE void spread_to_valid_tokens(double gradient, const Targets& targets, TokenRange range,
                                         Scalar* grad_token_logps) {
  const Scalar value = static_cast<Scalar>(gradient);
  const int64_t b = range.b;
  const int64_t first = static_cast<int64_t>(blockIdx.z) * kSequenceThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.z) * kSequenceThreads;
  for (int64_t t = range.begin + first; t < range.end; t += step) {
    store(grad_token_logps + b * targets.T + t, is_valid_token(targets, b, t) ? value : Scalar(0));
  }
}

}  // namespace simpo_ext::cuda
