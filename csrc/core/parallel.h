// How a CPU kernel borrows threads from whoever calls it, without knowing who that is.
#pragma once

#include <cstdint>

namespace simpo_ext {

// num_threads() is how many there are to borrow, the caller's among them.
// run(begin, end, grain, body, context) calls body(b, e, context) on disjoint ranges that cover
// [begin, end), each of at least grain indices while there are that many, and returns when all are
// done. A body must not throw.
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
