// How rows, or pieces of long rows, are divided among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace simpo_ext::cpu {

// A longer row is cut into pieces of this many logits. Where the pieces begin depends only on V, so
// that a row's sum has the same bits with any number of threads.
constexpr int64_t kPieceLength = 1 << 16;

inline int64_t pieces_of_row(int64_t V) { return (V + kPieceLength - 1) / kPieceLength; }

// A run is the logits that a thread takes at once. With runs below kLeastRun, a second thread costs
// more than it saves. Long runs waste less prefetching past their ends. Each thread takes several
// runs, so that no thread waits long for another to finish its last one.
constexpr int64_t kLeastRun = 1 << 16;
constexpr int64_t kMostRun = 1 << 19;
constexpr int64_t kRunsPerThread = 8;

// Calls function(i) for each i in [0, n), where each call costs as much as `cost` logits. Threads
// take short runs of consecutive i in turn. If one is held up, the others take the rest, and all of
// them read memory in the same neighbourhood.
template <typename Function>
void for_each_in_runs(ParallelFor parallel_for, int64_t n, int64_t cost, const Function& function) {
  const auto length_of = [&](int64_t logits) {
    return std::max<int64_t>(1, logits / std::max<int64_t>(cost, 1));
  };
  const int64_t run = std::clamp(n / (kRunsPerThread * parallel_for.num_threads()),
                                 length_of(kLeastRun), length_of(kMostRun));
  const int64_t runs = (n + run - 1) / run;
  std::atomic<int64_t> next{0};
  // The ranges of the calls do not matter: each call takes runs until none are left.
  parallel_for(0, runs, 1, [&](int64_t, int64_t) {
    for (int64_t taken = next.fetch_add(1, std::memory_order_relaxed); taken < runs;
         taken = next.fetch_add(1, std::memory_order_relaxed)) {
      const int64_t end = std::min(n, (taken + 1) * run);
      for (int64_t i = taken * run; i < end; ++i) function(i);
    }
  });
}

}  // namespace simpo_ext::cpu
