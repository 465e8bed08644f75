// A ParallelFor with std::threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "core/parallel.h"

namespace simpo_ext::test {

// Three threads, so that ranges are cut at odd places.
inline constexpr ParallelFor kThreads{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      const int64_t step = std::max(grain, (end - begin + 2) / 3);
      std::vector<std::thread> threads;
      for (int64_t b = begin; b < end; b += step) {
        threads.emplace_back([=] { body(b, std::min(b + step, end), context); });
      }
      for (std::thread& thread : threads) thread.join();
    },
    [] { return int64_t{3}; }};

}  // namespace simpo_ext::test
