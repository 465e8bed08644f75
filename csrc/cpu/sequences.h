// Checks of a layout for the CPU kernels, and the positions of its sequences and pairs.
#pragma once

#include <cstdint>

#include "core/views.h"

namespace simpo_ext::cpu {

// The first error of cu_seqlens for a row of N positions.
inline LayoutError find_sequence_error(const Sequences& sequences, int64_t N) {
  using Kind = LayoutError::Kind;
  const int64_t* cu_seqlens = sequences.cu_seqlens;
  if (cu_seqlens == nullptr) return {};
  const int64_t S = sequences.S;
  if (cu_seqlens[0] < 0) return {Kind::kBegin, 0, cu_seqlens[0], 0};
  for (int64_t s = 0; s < S; ++s) {
    if (cu_seqlens[s + 1] < cu_seqlens[s]) {
      return {Kind::kOrder, s + 1, cu_seqlens[s + 1], cu_seqlens[s]};
    }
  }
  if (cu_seqlens[S] > N) return {Kind::kEnd, S, cu_seqlens[S], N};
  return {};
}

inline LayoutError find_pair_error(const Pairs& pairs, int64_t S) {
  if (pairs.indices == nullptr) return {};
  for (int64_t i = 0; i < 2 * pairs.P; ++i) {
    const int64_t sequence = pairs.indices[i];
    if (sequence < 0 || sequence >= S) return {LayoutError::Kind::kPair, i, sequence, S};
  }
  return {};
}

inline LayoutError find_layout_error(const Sequences& sequences, const Pairs& pairs, int64_t N) {
  const LayoutError error = find_sequence_error(sequences, N);
  return error.found() ? error : find_pair_error(pairs, sequences.S);
}

inline TokenRange range_of(const Sequences& sequences, const Targets& targets, int64_t s) {
  if (sequences.cu_seqlens == nullptr) return {s, 0, targets.T};
  return {0, sequences.cu_seqlens[s], sequences.cu_seqlens[s + 1]};
}

struct PairMembers {
  int64_t chosen, rejected;
  double weight;
};

inline PairMembers members_of(const Pairs& pairs, int64_t p) {
  const double weight = pairs.weights == nullptr ? 1.0 : pairs.weights[p];
  if (pairs.indices == nullptr) return {p, pairs.P + p, weight};
  return {pairs.indices[2 * p], pairs.indices[2 * p + 1], weight};
}

}  // namespace simpo_ext::cpu
