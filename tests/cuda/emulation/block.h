// The scheduler's state of a block, its warps and its threads. Only emulator.cpp uses it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace simpo_ext::emulation {

inline bool is_same_place(const SourceLocation& a, const SourceLocation& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// A CUDA thread. The next block uses the same object for another thread.
struct Fiber {
  Context context;
  unsigned thread = 0;
  bool has_exited = false;
  size_t num_uniform_loads = 0;
  // What it waits for, or did last.
  const char* operation = "";
  SourceLocation where;

  unsigned lane() const { return thread % kWarpSize; }
};

// A call of a warp collective in which some lanes wait for the others in their mask.
struct Collective {
  uint32_t mask;
  uint32_t arrived;
  const Fiber* first_arrived;
  SyncPoint* sync_point;
};

struct Warp {
  uint32_t existing = 0;  // lanes: fewer than 32 in the last warp of some blocks
  uint32_t exited = 0;
  // More than one if lanes meet in groups. Groups overlap if lanes that have finished one wait for
  // lanes that have not.
  std::array<Collective, kWarpSize> waiting;
  unsigned num_waiting = 0;
  std::array<uint64_t, kWarpSize> values;
  std::array<unsigned, kWarpSize> source_lanes;
  // Separate from values, because a lane may bring its next value before another lane has fetched
  // its result.
  std::array<uint64_t, kWarpSize> results;
  // Used in turn. A lane may reach its next collective while others have not left this one. With a
  // single sync point, TSan would order what it did in between before them.
  std::array<SyncPoint, kWarpSize> sync_points;
  unsigned num_collectives = 0;
};

struct SharedArray {
  const void* identity;
  std::unique_ptr<unsigned char[]> memory;
};

// On the heap, because TSan forgets a sync point only when its memory is freed. The sync points of
// one block must not order anything in the next.
struct Block {
  explicit Block(unsigned num_threads)
      : num_running(num_threads), warps((num_threads + kWarpSize - 1) / kWarpSize) {
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      warps[thread / kWarpSize].existing |= 1u << thread % kWarpSize;
    }
  }

  unsigned num_running;      // threads that have not exited
  unsigned num_waiting = 0;  // at __syncthreads
  const Fiber* first_waiting = nullptr;
  std::array<SyncPoint, 2> sync_points;  // used in turn, as in Warp
  unsigned num_barriers = 0;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared_arrays;
  std::vector<const void*> uniform_addresses;  // the address of the n-th load_uniform
};

}  // namespace simpo_ext::emulation
