// The emulator's scheduler. Never compiled with -fsanitize=thread: see fiber.h.
//
// A thread runs until it waits or exits, and then switches directly to the next one. Allocations
// while a thread runs are under HiddenFromTsan. A switch does not allocate.

#include "emulator.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "fiber.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace simpo_ext::emulation {
namespace {

// splitmix64, which takes any seed, including 0.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // In [0, bound).
  uint64_t below(uint64_t bound) {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t bits = state_;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    return static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * bound >> 64);
  }

 private:
  uint64_t state_;
};

struct State {
  std::mutex mutex;  // held throughout a launch
  Order order = Order::kShuffled;
  Random random{0};
  Counters counters{};
  std::set<const void*> kernels;  // launched since they were read

  void (*thread_main)(const void*) = nullptr;
  const void* thread_context = nullptr;
  SyncPoint launch_begin, launch_end;

  std::vector<std::unique_ptr<Fiber>> fibers;  // the i-th runs thread i; used again and again
  unsigned num_threads = 0;                    // of a block
  std::unique_ptr<Block> block;
  std::array<Fiber*, kMaxBlockThreads> ready;  // a stack: the last to become ready runs first
  unsigned num_ready = 0;
  Fiber* current = nullptr;
  Context host;                // the OS thread that launched
  Context* running = nullptr;  // current's, or host
};

// Never destroyed, so that the order of destruction at exit does not matter.
State& state = *new State;

// ---- reports --------------------------------------------------------------------------------

[[noreturn]] void report(const std::string& message) {
  std::fprintf(stderr, "cuda emulation: %s\n", message.c_str());
  std::abort();
}

std::string name(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of block (" + std::to_string(blockIdx.x) +
         ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

std::string name_and_place(const Fiber& fiber) {
  return name(fiber) + " at " + fiber.operation + ", " + fiber.where.file_name() + ":" +
         std::to_string(fiber.where.line());
}

std::string hexadecimal(uint32_t mask) {
  std::array<char, 16> text;
  std::snprintf(text.data(), text.size(), "0x%08x", mask);
  return text.data();
}

[[noreturn]] void report_deadlock() {
  const auto begin = state.fibers.begin(), end = begin + state.num_threads;
  std::string places;
  for (auto fiber = begin; fiber != end; ++fiber) {
    const auto is_at_same_place = [&](const auto& other) {
      return !other->has_exited && is_same_place(other->where, (*fiber)->where);
    };
    // Each place once, with the first thread that waits there.
    if ((*fiber)->has_exited || std::any_of(begin, fiber, is_at_same_place)) continue;
    const auto count = std::count_if(begin, end, is_at_same_place);
    places += "\n  " + name_and_place(**fiber) + ", " + std::to_string(count) + " in all";
  }
  report("deadlock: every thread waits" + places);
}

// ---- waiting and waking ---------------------------------------------------------------------

void wake_lanes(unsigned warp_index, uint32_t lanes) {
  for (unsigned i = 0; i < kWarpSize; ++i) {
    const unsigned lane = state.order == Order::kForward ? kWarpSize - 1 - i : i;
    if ((lanes >> lane & 1) == 0) continue;
    state.ready[state.num_ready++] = state.fibers[warp_index * kWarpSize + lane].get();
  }
}

void wake_block() {
  const unsigned num_warps = static_cast<unsigned>(state.block->warps.size());
  for (unsigned i = 0; i < num_warps; ++i) {
    const unsigned warp_index = state.order == Order::kForward ? num_warps - 1 - i : i;
    wake_lanes(warp_index, state.block->warps[warp_index].existing);
  }
}

// Returns when it is the caller's turn again, possibly immediately.
void run_next() {
  Context* const suspended = state.running;
  if (state.num_ready > 0) {
    Fiber*& last = state.ready[--state.num_ready];
    if (state.order == Order::kShuffled) {
      std::swap(last, state.ready[state.random.below(state.num_ready + 1)]);
    }
    state.current = last;
    state.running = &last->context;
    threadIdx.x = last->thread;
  } else if (state.block->num_running > 0) {
    report_deadlock();
  } else {
    state.running = &state.host;
  }
  if (state.running != suspended) switch_context(*suspended, *state.running);
}

void exit_thread() {
  Fiber& fiber = *state.current;
  Block& block = *state.block;
  Warp& warp = block.warps[fiber.thread / kWarpSize];
  fiber.has_exited = true;
  block.num_running -= 1;
  warp.exited |= 1u << fiber.lane();
  const Fiber* waiting = nullptr;
  if (block.num_waiting > 0) waiting = block.first_waiting;
  for (unsigned i = 0; i < warp.num_waiting; ++i) {
    const Collective& collective = warp.waiting[i];
    if (collective.mask >> fiber.lane() & 1) waiting = collective.first_arrived;
  }
  if (waiting) report(name(fiber) + " has exited; waiting for it: " + name_and_place(*waiting));
  run_next();
}

[[noreturn]] void run_threads() {
  arrive_in(state.current->context);
  for (;;) {
    state.launch_begin.acquire();
    state.thread_main(state.thread_context);
    state.launch_end.release();
    exit_thread();
  }
}

// ---- launches -------------------------------------------------------------------------------

void run_block() {
  const HiddenFromTsan hidden;  // hides the block's memory, but not the accesses of its fibers
  state.block = std::make_unique<Block>(state.num_threads);
  // Blocks are not ordered, but TSan orders everything that one fiber does. So thread i of the next
  // block is another fiber. There is one fiber more than threads, so that this also holds for
  // blocks of one thread.
  const auto begin = state.fibers.begin();
  std::rotate(begin, begin + 1, begin + state.num_threads + 1);
  for (unsigned thread = 0; thread < state.num_threads; ++thread) {
    state.fibers[thread]->thread = thread;
    state.fibers[thread]->has_exited = false;
    state.fibers[thread]->num_uniform_loads = 0;
  }
  wake_block();
  state.running = &state.host;
  run_next();
  state.block.reset();
}

void run_blocks() {
  const uint64_t num_blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  // If the step has no common factor with the number of blocks, it reaches all of them.
  uint64_t index = 0, step = 1;
  if (state.order == Order::kReverse) index = step = num_blocks - 1;
  if (state.order == Order::kShuffled) {
    index = state.random.below(num_blocks);
    do {
      step = state.random.below(num_blocks);
    } while (std::gcd(step, num_blocks) != 1);
  }
  for (uint64_t i = 0; i < num_blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(index % gridDim.x);
    blockIdx.y = static_cast<unsigned>(index / gridDim.x % gridDim.y);
    blockIdx.z = static_cast<unsigned>(index / gridDim.x / gridDim.y);
    run_block();
    index = (index + step) % num_blocks;
  }
}

}  // namespace

int run_grid(const void* kernel, dim3 grid, dim3 block, void (*thread_main)(const void*),
             const void* context) {
  const auto is_within = [](uint64_t value, int64_t limit) {
    return value > 0 && value <= static_cast<uint64_t>(limit);
  };
  if (!is_within(grid.x, kMaxGridX) || !is_within(grid.y, kMaxGridY) ||
      !is_within(grid.z, kMaxGridZ) || !is_within(block.x, kMaxBlockThreads)) {
    return kInvalidConfiguration;
  }
  if (block.y != 1 || block.z != 1) report("blocks have one dimension in this emulator");

  const std::lock_guard<std::mutex> lock(state.mutex);
  state.counters.launches += 1;
  state.kernels.insert(kernel);
  state.thread_main = thread_main;
  state.thread_context = context;
  state.num_threads = block.x;
  gridDim = grid;
  blockDim = block;
  become_host(state.host);
  while (state.fibers.size() < state.num_threads + 1) {
    const unsigned index = static_cast<unsigned>(state.fibers.size());
    state.fibers.push_back(std::make_unique<Fiber>());
    become_fiber(state.fibers.back()->context, run_threads, index);
  }
  state.launch_begin.release();
  run_blocks();
  state.launch_end.acquire();
  return 0;
}

// ---- __syncthreads --------------------------------------------------------------------------

void wait_for_block(SourceLocation where) {
  Fiber& fiber = *state.current;
  Block& block = *state.block;
  fiber.operation = "__syncthreads";
  fiber.where = where;
  if (block.num_running != state.num_threads) {
    const auto exited = std::find_if(state.fibers.begin(), state.fibers.begin() + state.num_threads,
                                     [](const auto& other) { return other->has_exited; });
    report(name(**exited) + " has exited; waiting for it: " + name_and_place(fiber));
  }
  if (block.num_waiting == 0) block.first_waiting = &fiber;
  if (!is_same_place(block.first_waiting->where, where)) {
    report("threads of one block wait at different barriers: " +
           name_and_place(*block.first_waiting) + ", and " + name_and_place(fiber));
  }
  SyncPoint& sync_point = block.sync_points[block.num_barriers % 2];
  sync_point.release();
  block.num_waiting += 1;
  if (block.num_waiting == state.num_threads) {
    block.num_waiting = 0;
    block.num_barriers += 1;
    wake_block();
  }
  run_next();
  sync_point.acquire();
}

// ---- warp collectives -----------------------------------------------------------------------

namespace {

void check_mask(const Warp& warp, const Fiber& fiber, uint32_t mask, unsigned source_lane) {
  const char* problem = nullptr;
  if ((mask >> fiber.lane() & 1) == 0) problem = "the calling lane is not in the mask";
  if ((mask & ~warp.existing) != 0) problem = "the block has no such lane";
  if ((mask & warp.exited) != 0) problem = "a lane in the mask has exited";
  if ((mask >> source_lane & 1) == 0) problem = "the lane it reads from is not in the mask";
  if (problem) {
    report(name_and_place(fiber) + ", mask " + hexadecimal(mask) + ", source lane " +
           std::to_string(source_lane) + ": " + problem);
  }
}

// The collective of the calling lane: one in which lanes already wait, or a new one.
Collective& join(Warp& warp, const Fiber& fiber, uint32_t mask) {
  Collective* joined = nullptr;
  for (unsigned i = 0; i < warp.num_waiting; ++i) {
    Collective& collective = warp.waiting[i];
    // If only one side waits for the other, the other may still come.
    const bool awaits_caller = collective.mask >> fiber.lane() & 1;
    if (!awaits_caller || (collective.arrived & mask) == 0) continue;
    const Fiber& other = *collective.first_arrived;
    if (!is_same_place(other.where, fiber.where)) {
      report("lanes of one warp wait at different collectives: " + name_and_place(other) +
             ", and " + name_and_place(fiber));
    }
    if (collective.mask != mask) {
      report("lanes of one warp pass different masks: " + name_and_place(other) + ", mask " +
             hexadecimal(collective.mask) + ", and " + name_and_place(fiber) + ", mask " +
             hexadecimal(mask));
    }
    joined = &collective;
  }
  if (joined) return *joined;
  SyncPoint& sync_point = warp.sync_points[warp.num_collectives++ % kWarpSize];
  return warp.waiting[warp.num_waiting++] = Collective{mask, 0, &fiber, &sync_point};
}

}  // namespace

uint64_t exchange_in_warp(const char* operation, uint32_t mask, uint64_t value,
                          unsigned source_lane, SourceLocation where) {
  Fiber& fiber = *state.current;
  const unsigned lane = fiber.lane();
  const unsigned warp_index = fiber.thread / kWarpSize;
  Warp& warp = state.block->warps[warp_index];
  fiber.operation = operation;
  fiber.where = where;
  // This mask may contain lanes that the block does not have, as in CUDA.
  constexpr uint32_t kWholeWarp = 0xffffffffu;
  if (mask == kWholeWarp) mask = warp.existing;
  check_mask(warp, fiber, mask, source_lane);

  Collective& collective = join(warp, fiber, mask);
  SyncPoint& sync_point = *collective.sync_point;
  sync_point.release();
  warp.values[lane] = value;
  warp.source_lanes[lane] = source_lane;
  collective.arrived |= 1u << lane;
  if (collective.arrived == mask) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (mask >> i & 1) warp.results[i] = warp.values[warp.source_lanes[i]];
    }
    collective = warp.waiting[--warp.num_waiting];
    wake_lanes(warp_index, mask);
  }
  run_next();
  sync_point.acquire();
  return warp.results[lane];
}

unsigned lane() { return state.current->lane(); }

// ---- memory ---------------------------------------------------------------------------------

void* shared_array(const void* identity, size_t bytes) {
  std::vector<SharedArray>& arrays = state.block->shared_arrays;
  for (const SharedArray& array : arrays) {
    if (array.identity == identity) return array.memory.get();
  }
  const HiddenFromTsan hidden;
  arrays.push_back({identity, std::unique_ptr<unsigned char[]>(new unsigned char[bytes])});
  std::memset(arrays.back().memory.get(), 0xff, bytes);
  return arrays.back().memory.get();
}

namespace {

void note_access(const char* operation, const void* address, size_t bytes, size_t alignment,
                 SourceLocation where) {
  Fiber& fiber = *state.current;
  fiber.operation = operation;
  fiber.where = where;
  const uintptr_t misalignment = reinterpret_cast<uintptr_t>(address) % alignment;
  if (misalignment == 0) return;
  report("misaligned access, " + std::to_string(bytes) + " bytes at an address " +
         std::to_string(misalignment) + " above a multiple of " + std::to_string(alignment) + ": " +
         name_and_place(fiber));
}

void count_load(size_t bytes) {
  state.counters.bytes_loaded += bytes;
  state.counters.vector_loads += bytes == 16 ? 1 : 0;
}

}  // namespace

void before_load(const void* address, size_t bytes, size_t alignment, SourceLocation where) {
  note_access("load", address, bytes, alignment, where);
  count_load(bytes);
}

void before_uniform_load(const void* address, size_t bytes, size_t alignment,
                         SourceLocation where) {
  note_access("load_uniform", address, bytes, alignment, where);
  // The n-th load_uniform of all threads counts as one load, by the first thread that reaches it.
  std::vector<const void*>& addresses = state.block->uniform_addresses;
  Fiber& fiber = *state.current;
  const size_t n = fiber.num_uniform_loads++;
  if (n == addresses.size()) {
    const HiddenFromTsan hidden;
    addresses.push_back(address);
    count_load(bytes);
  }
  if (address != addresses[n]) {
    report("threads of one block load from different addresses: " + name_and_place(fiber));
  }
}

void before_store(const void* address, size_t bytes, size_t alignment, SourceLocation where) {
  note_access("store", address, bytes, alignment, where);
  state.counters.bytes_stored += bytes;
  state.counters.vector_stores += bytes == 16 ? 1 : 0;
}

// ---- for tests ------------------------------------------------------------------------------

void set_schedule(Order order, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.order = order;
  state.random = Random(seed);
}

Counters read_counters() {
  const std::lock_guard<std::mutex> lock(state.mutex);
  return std::exchange(state.counters, Counters{});
}

int simpo_emulation_set_schedule(int order, uint64_t seed) {
  if (order < 0 || order > static_cast<int>(Order::kShuffled)) return 1;
  set_schedule(static_cast<Order>(order), seed);
  return 0;
}

void simpo_emulation_read_counters(uint64_t out[5]) {
  const Counters counters = read_counters();
  out[0] = counters.launches;
  out[1] = counters.bytes_loaded;
  out[2] = counters.bytes_stored;
  out[3] = counters.vector_loads;
  out[4] = counters.vector_stores;
}

size_t simpo_emulation_launched_kernels(const void** out, size_t capacity) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  size_t count = 0;
  for (const void* kernel : state.kernels) {
    if (count < capacity) out[count] = kernel;
    ++count;
  }
  state.kernels.clear();
  return count;
}

}  // namespace simpo_ext::emulation
