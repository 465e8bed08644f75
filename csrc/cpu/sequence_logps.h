// Masked sums over a sequence's tokens: the step between token log-probs and everything per
// sequence.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/compensated_sum.h"
#include "core/preference.h"
#include "core/views.h"

namespace simpo_ext::cpu {

// Of the valid tokens of sequence b. Masked positions are not read.
template <typename Scalar>
SequenceSum sum_valid_tokens(const Scalar* token_logps, TokenStrides strides,
                             const Targets& targets, int64_t b) {
  CompensatedSum<double> sum;
  int64_t count = 0;
  for (int64_t t = 0; t < targets.T; ++t) {
    if (!targets.is_valid(b, t)) continue;
    sum.add(static_cast<double>(token_logps[strides.offset(b, t)]));
    ++count;
  }
  return {sum.value(), count};
}

// grad_token_logps[b, :] = weight at valid positions and 0 at masked ones, whatever weight is.
template <typename Scalar>
void spread_to_valid_tokens(double weight, const Targets& targets, int64_t b,
                            Scalar* grad_token_logps) {
  Scalar* row = grad_token_logps + b * targets.T;
  for (int64_t t = 0; t < targets.T; ++t) {
    row[t] = targets.is_valid(b, t) ? static_cast<Scalar>(weight) : Scalar(0);
  }
}

// Sequences a thread takes at once: below this many tokens a second one costs more than it saves.
inline int64_t sequences_per_task(int64_t T) {
  return std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(T, 1));
}

}  // namespace simpo_ext::cpu
