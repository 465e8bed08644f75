// How a CPU kernel uses the threads of its caller, for example torch's.
#pragma once

#include <cstdint>

namespace simpo_ext {

// num_threads() is the number of threads, including the caller's own.
// run(begin, end, grain, body, context) calls body(b, e, context) on disjoint ranges that cover
// [begin, end), and returns when all calls have returned. A range has at least grain indices unless
// [begin, end) has fewer. A body must not throw.
struct ParallelFor {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
  int64_t (*num_threads)();

  template <typename Function>
  void operator()(int64_t begin, int64_t end, int64_t grain, const Function& function) const {
    if (begin >= end) return;
    run(
        begin, end, grain,
        [](int64_t b, int64_t e, void* context) { (*static_cast<const Function*>(context))(b, e); },
        const_cast<void*>(static_cast<const void*>(&function)));
  }
};

}  // namespace simpo_ext
