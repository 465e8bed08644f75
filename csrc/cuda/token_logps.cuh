// Per-token log-probabilities on the GPU. A block of threads works on a token row. If there are few
// rows, several blocks share each.
//
// Memory contract, per row of V logits of e bytes:
//
//   forward: reads a scored row once and its label's logit again, (V + 1) e bytes, and writes 16
//   bytes, 24 for float64. A masked row costs one label load. A report writes 16 more bytes and, if
//   it covers all positions, reads masked rows once. Blocks that share a row write 24 bytes for
//   each of its segments, and a second kernel reads them.
//
//   backward, also in place: reads and writes a scored row once, and its label's logit again. If a
//   row is masked or its incoming gradient is 0, writes zeros without reading its logits. Reads the
//   label, grad_logps, max and sum_exp of every row.
//
// For a part of the vocabulary, the forward reads the label's logit only if the part has the label,
// and reads max and sum_exp of earlier parts. It writes max, sum_exp and, if the part has the label
// or is the first, the label's z. Only if the part has the label, the backward reads and writes the
// label's logit again, and writes its gradient.
//
// A label outside the vocabulary is not used as an index: its row becomes NaN.
//
// Every sum has a fixed order, so equal inputs at equal alignments give equal bits with any number
// of rows. Rows may start at any element. 16-byte accesses begin at the first aligned one.
#pragma once

#include <cstdint>

#include "cuda/platform.h"

namespace simpo_ext::cuda {

// The number of 16-byte loads that a thread has in flight. tanh and exp of a double leave no
// registers for four loads, and take longer than these.
template <typename T, class Logits>
constexpr int kVectorsInFlight = sizeof(T) == 8 || Logits::kIsCapped ? 2 : 4;

constexpr int kSmallBlock = 128, kLargeBlock = 256;

// A multiprocessor holds as many threads in small blocks as in large ones, so as many loads are in
// flight either way. Small blocks hold more rows at once: while one row waits for its label or is
// being reduced, others load. Large blocks finish a row sooner, so that fewer multiprocessors are
// idle at the end of a launch. They pay off if a row has at least two full batches of their loads.
template <typename T, class Logits>
constexpr int64_t kLargeRowBytes =
    int64_t{2} * kLargeBlock * kVectorsInFlight<T, Logits> * sizeof(Vector16);

template <typename T, class Logits>
bool is_large_row(int64_t V) {
  return V * static_cast<int64_t>(sizeof(T)) >= kLargeRowBytes<T, Logits>;
}

}  // namespace simpo_ext::cuda
