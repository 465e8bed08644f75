// Sums over the valid tokens of a sequence, and the gradients of these tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/compensated_sum.h"
#include "core/preference.h"
#include "core/views.h"
#include "cpu/sequences.h"

namespace simpo_ext::cpu {

// The sum over the valid tokens of a sequence. Masked positions are not read.
template <typename Scalar>
SequenceSum sum_valid_tokens(const Scalar* token_logps, TokenStrides strides,
                             const Targets& targets, TokenRange range) {
  CompensatedSum<double> sum;
  int64_t count = 0;
  for (int64_t t = range.begin; t < range.end; ++t) {
    if (!targets.is_valid(range.b, t)) continue;
    sum.add(static_cast<double>(token_logps[strides.offset(range.b, t)]));
    ++count;
  }
  return {sum.value(), count};
}

// grad_token_logps = gradient at valid positions, and 0 at masked ones even if gradient is NaN.
template <typename Scalar>
void spread_to_valid_tokens(double gradient, const Targets& targets, TokenRange range,
                            Scalar* grad_token_logps) {
  Scalar* row = grad_token_logps + range.b * targets.T;
  for (int64_t t = range.begin; t < range.end; ++t) {
    row[t] = targets.is_valid(range.b, t) ? static_cast<Scalar>(gradient) : Scalar(0);
  }
}

// The number of sequences that a thread takes at once. With fewer tokens than this, a second thread
// costs more than it saves.
inline int64_t sequences_per_task(const Sequences& sequences, const Targets& targets) {
  const int64_t tokens = targets.B * targets.T / std::max<int64_t>(sequences.S, 1);
  return std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(tokens, 1));
}

}  // namespace simpo_ext::cpu
