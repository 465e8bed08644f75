// How the rows of a batch, and long rows in pieces, are handed to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace simpo_ext::cpu {

// A row is worked on in pieces of this many logits, by however many threads: where they begin
// depends on V alone, so that sums do not depend on the threads.
constexpr int64_t kPieceLength = 1 << 16;

inline int64_t pieces_of_row(int64_t V) { return (V + kPieceLength - 1) / kPieceLength; }

// Logits that a thread takes at once. Below the least, a second thread costs more than it saves.
// Towards the most, what is prefetched past the end of a run, for nothing, is less and less of it;
// each thread takes several runs, so that none is left waiting for another's last.
constexpr int64_t kLeastRun = 1 << 16;
constexpr int64_t kMostRun = 1 << 19;
constexpr int64_t kRunsPerThread = 8;

// Calls function(i) for each i in [0, n), each of which costs as much as cost logits. Threads take
// short runs of consecutive i in turn, so that one that is held up leaves the rest to the others,
// and all of them read memory in one neighbourhood.
template <typename Function>
void for_each_in_runs(ParallelFor parallel_for, int64_t n, int64_t cost, const Function& function) {
  const auto length_of = [&](int64_t logits) {
    return std::max<int64_t>(1, logits / std::max<int64_t>(cost, 1));
  };
  const int64_t run = std::clamp(n / (kRunsPerThread * parallel_for.num_threads()),
                                 length_of(kLeastRun), length_of(kMostRun));
  const int64_t runs = (n + run - 1) / run;
  std::atomic<int64_t> next{0};
  // However the range is cut: each call takes runs until there are none.
  parallel_for(0, runs, 1, [&](int64_t, int64_t) {
    for (int64_t taken = next.fetch_add(1, std::memory_order_relaxed); taken < runs;
         taken = next.fetch_add(1, std::memory_order_relaxed)) {
      const int64_t end = std::min(n, (taken + 1) * run);
      for (int64_t i = taken * run; i < end; ++i) function(i);
    }
  });
}

}  // namespace simpo_ext::cpu
