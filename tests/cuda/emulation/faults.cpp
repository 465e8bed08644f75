// Tiny kernels for tests/cuda/test_emulator.py: some with one planted fault each, whose line says
// "fault:" and its name, and some without.
//
//     faults NAME
//
// A kernel without a fault prints "ok"; one whose fault shows in its result prints the result.

#include <sys/resource.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/platform.h"
#include "emulator.h"

namespace simpo_ext::cuda {
namespace {

using emulation::Counters;
using emulation::Order;
using emulation::read_counters;
using emulation::set_schedule;

constexpr unsigned kAllLanes = 0xffffffffu;

void require(bool condition, const char* what, double got = 0.0, double expected = 0.0) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (got %.17g, expected %.17g)\n", what, got, expected);
  std::exit(1);
}

// Memory aligned to 16 bytes, whose exact size a sanitizer checks.
std::unique_ptr<float[]> make_floats(size_t size, float value = 1.0f) {
  std::unique_ptr<float[]> floats(new float[size]);
  for (size_t i = 0; i < size; ++i) floats[i] = value;
  return floats;
}

// ---- alignment ------------------------------------------------------------------------------

__global__ void misaligned_vector(const float* x, float* out) {
  const Vector16* vectors = reinterpret_cast<const Vector16*>(x + 1);
  const Vector16 vector = load_streaming(vectors);  // fault: misaligned-vector
  store(out + threadIdx.x, static_cast<float>(vector.words[0]));
}

__global__ void misaligned_scalar(float* out) {
  char* bytes = reinterpret_cast<char*>(out) + 2;
  store(reinterpret_cast<float*>(bytes), 0.0f);  // fault: misaligned-scalar
}

// ---- barriers and collectives ---------------------------------------------------------------

__global__ void divergent_barrier() {
  if (threadIdx.x < 40) {
    __syncthreads();  // fault: divergent-barrier
  } else {
    __syncthreads();  // fault: divergent-barrier
  }
}

__global__ void exit_before_barrier() {
  if (threadIdx.x == 7) return;
  __syncthreads();  // fault: exit-before-barrier
}

__global__ void exit_before_shuffle(float* out) {
  if (threadIdx.x == 7) return;
  const float value = __shfl_xor_sync(kAllLanes, 1.0f, 1);  // fault: exit-before-shuffle
  store(out + threadIdx.x, value);
}

__global__ void deadlock() {
  if (threadIdx.x < 16) {
    __syncwarp();  // fault: deadlock
  } else {
    __syncthreads();  // fault: deadlock
  }
}

__global__ void divergent_shuffle(float* out) {
  float value = 1.0f;
  if (threadIdx.x % 2 == 0) {
    value += __shfl_xor_sync(kAllLanes, value, 2);  // fault: divergent-shuffle
  } else {
    value -= __shfl_xor_sync(kAllLanes, value, 2);  // fault: divergent-shuffle
  }
  store(out + threadIdx.x, value);
}

__global__ void wrong_mask(float* out) {
  const float value = __shfl_sync(0xfffffffeu, 1.0f, 1);  // fault: wrong-mask
  store(out + threadIdx.x, value);
}

__global__ void different_masks(float* out) {
  const unsigned mask = threadIdx.x < 16 ? kAllLanes : 0xfffffffeu;
  const float value = __shfl_sync(mask, 1.0f, 16);  // fault: different-masks
  store(out + threadIdx.x, value);
}

__global__ void absent_source_lane(float* out) {
  const float value = __shfl_xor_sync(kAllLanes, 1.0f, 16);  // fault: absent-source-lane
  store(out + threadIdx.x, value);
}

// ---- memory ---------------------------------------------------------------------------------

__global__ void out_of_bounds_scalar(const float* x, float* out) {
  const float value = load(x + threadIdx.x + 1);  // fault: out-of-bounds-scalar
  store(out + threadIdx.x, value);
}

__global__ void out_of_bounds_vector(float* out) {
  Vector16* vectors = reinterpret_cast<Vector16*>(out);
  store_streaming(vectors + threadIdx.x, Vector16{});  // fault: out-of-bounds-vector
}

__global__ void out_of_bounds_shared(float* out) {
  SIMPO_SHARED(float, values, 32);
  float* next = values + 1;
  next[threadIdx.x] = 1.0f;  // fault: out-of-bounds-shared
  store(out + threadIdx.x, values[threadIdx.x]);
}

__global__ void out_of_bounds_index(float* out) {
  SIMPO_SHARED(float, values, 32);
  values[threadIdx.x + 1] = 1.0f;  // fault: out-of-bounds-index
  store(out + threadIdx.x, values[threadIdx.x]);
}

// Only block 0 fills the array, and both read it.
__global__ void stale_shared_memory(float* out) {
  SIMPO_SHARED(float, values, 32);
  if (blockIdx.x == 0) values[threadIdx.x] = 1.0f;
  store(out + blockIdx.x * blockDim.x + threadIdx.x, values[threadIdx.x]);
}

__global__ void non_uniform_load(const float* x, float* out) {
  const float value = load_uniform(x + threadIdx.x / 32);  // fault: non-uniform-load
  store(out + threadIdx.x, value);
}

// ---- races ----------------------------------------------------------------------------------

__global__ void missing_barrier(float* out) {
  SIMPO_SHARED(float, values, 64);
  values[threadIdx.x] = 1.0f;                    // fault: missing-barrier
  const float value = values[63 - threadIdx.x];  // fault: missing-barrier
  store(out + threadIdx.x, value);
}

// A barrier between the write and the read, but none before the next write.
__global__ void missing_second_barrier(float* out) {
  SIMPO_SHARED(float, value, 1);
  float sum = 0.0f;
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == round) value[0] = 1.0f;  // fault: missing-second-barrier
    __syncthreads();
    sum += value[0];  // fault: missing-second-barrier
  }
  store(out + threadIdx.x, sum);
}

__global__ void missing_warp_sync(float* out) {
  SIMPO_SHARED(float, values, 32);
  values[threadIdx.x] = 1.0f;                   // fault: missing-warp-sync
  const float value = values[threadIdx.x ^ 1];  // fault: missing-warp-sync
  store(out + threadIdx.x, value);
}

// The collectives of a warp order its own lanes, but not those of another warp.
__global__ void warp_sync_for_barrier(float* out) {
  SIMPO_SHARED(float, values, 64);
  values[threadIdx.x] = 1.0f;  // fault: warp-sync-for-barrier
  __syncwarp();
  const float value = values[threadIdx.x ^ 32];  // fault: warp-sync-for-barrier
  store(out + threadIdx.x, value);
}

// A thread's accesses after a barrier are not ordered before those of other threads, even if it
// already waits at the next barrier.
__global__ void race_after_barrier(float* out) {
  SIMPO_SHARED(float, value, 1);
  __syncthreads();
  if (threadIdx.x == 0) value[0] = 1.0f;       // fault: race-after-barrier
  if (threadIdx.x == 1) store(out, value[0]);  // fault: race-after-barrier
  __syncthreads();
}

__global__ void race_after_collective(float* out) {
  SIMPO_SHARED(float, value, 1);
  __syncwarp();
  if (threadIdx.x == 0) value[0] = 1.0f;       // fault: race-after-collective
  if (threadIdx.x == 1) store(out, value[0]);  // fault: race-after-collective
  __syncwarp();
}

__global__ void race_between_blocks(float* out) {
  __syncthreads();                          // which orders nothing between blocks
  out[0] = static_cast<float>(blockIdx.x);  // fault: race-between-blocks
}

// ---- kernels without a fault ----------------------------------------------------------------

// Each block sums its row: x [rows, columns] -> out [rows], times scale. Rows start at multiples of
// 16 bytes, row_stride apart. All elements are integers, so that any order gives the same sum.
__global__ void reduction(const float* x, int64_t columns, int64_t row_stride, const double* scale,
                          float* out) {
  SIMPO_SHARED(float, warp_sums, 32);
  SIMPO_SHARED(float, broadcast, 1);
  const int64_t row = blockIdx.x + int64_t{gridDim.x} * (blockIdx.y + gridDim.y * blockIdx.z);
  const float* elements = x + row * row_stride;
  const Vector16* vectors = reinterpret_cast<const Vector16*>(elements);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned num_warps = (blockDim.x + 31) / 32;

  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < columns / 4; i += blockDim.x) {
    const Vector16 vector = load_streaming(vectors + i);
    SIMPO_UNROLL
    for (const uint32_t word : vector.words) sum += float_from_bits(word);
  }
  for (int64_t i = columns / 4 * 4 + threadIdx.x; i < columns; i += blockDim.x) {
    sum += load(elements + i);
  }
  // The last warp may have any power of 2 as its number of lanes.
  const unsigned num_lanes = warp + 1 < num_warps ? 32 : blockDim.x - warp * 32;
  for (unsigned offset = num_lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, static_cast<int>(offset));
  }
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned i = 0; i < num_warps; ++i) total += warp_sums[i];
    broadcast[0] = total;
  }
  __syncthreads();
  const float product = broadcast[0] * static_cast<float>(load_uniform(scale));
  if (threadIdx.x == blockDim.x - 1) store(out + row, product);
}

void check_reduction(unsigned num_threads, int64_t columns) {
  const dim3 grid(3, 2, 2);
  constexpr int64_t kRows = 12;
  const int64_t row_stride = (columns + 3) / 4 * 4;
  const size_t size = static_cast<size_t>((kRows - 1) * row_stride + columns);
  std::unique_ptr<float[]> x = make_floats(size, 0.0f);
  for (size_t i = 0; i < size; ++i) x[i] = static_cast<float>(i % 11);
  const double scale = 2.0;
  std::unique_ptr<float[]> out = make_floats(kRows, -1.0f);
  read_counters();
  require(launch(reduction, grid, num_threads, nullptr, x.get(), columns, row_stride, &scale,
                 out.get()) == 0,
          "launch");
  for (int64_t row = 0; row < kRows; ++row) {
    float expected = 0.0f;
    for (int64_t i = 0; i < columns; ++i) expected += x[static_cast<size_t>(row * row_stride + i)];
    const float got = out[static_cast<size_t>(row)];
    require(got == 2 * expected, "sum of a row", got, 2 * expected);
  }
  const Counters counters = read_counters();
  const auto require_count = [](uint64_t got, int64_t expected, const char* what) {
    require(got == static_cast<uint64_t>(expected), what, static_cast<double>(got),
            static_cast<double>(expected));
  };
  require_count(counters.launches, 1, "launches");
  require_count(counters.bytes_loaded, kRows * (columns * 4 + 8), "bytes loaded");
  require_count(counters.bytes_stored, kRows * 4, "bytes stored");
  require_count(counters.vector_loads, kRows * (columns / 4), "vector loads");
  require_count(counters.vector_stores, 0, "vector stores");
  require_count(read_counters().bytes_loaded, 0, "reading starts the counters again");
}

void check_reductions() {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    for (const uint64_t seed : {0, 1, 2}) {
      set_schedule(order, seed);
      check_reduction(1, 5);       // one thread
      check_reduction(8, 100);     // one incomplete warp
      check_reduction(40, 1023);   // two warps, the second one incomplete
      check_reduction(1024, 700);  // the largest block, some of its threads without work
    }
  }
}

// Two OS threads launch at the same time, as the main thread and autograd's thread do.
void check_concurrent_launches() {
  const auto launch_often = [](float value, float* out) {
    const std::unique_ptr<float[]> x = make_floats(64, value);
    const double scale = 1.0;
    for (int i = 0; i < 20; ++i) {
      launch(reduction, 1, 32, nullptr, x.get(), 64, 64, &scale, out);
      require(*out == 64 * value, "sum", *out, 64 * value);
    }
  };
  read_counters();
  float first = 0.0f, second = 0.0f;
  std::thread other(launch_often, 1.0f, &first);
  launch_often(2.0f, &second);
  other.join();
  require(read_counters().launches == 40, "launches");
}

template <typename T>
__global__ void shuffles(T first, T step, T* out) {
  const unsigned lane = threadIdx.x % 32;
  const T own = first + step * static_cast<T>(lane);
  const T neighbour = __shfl_xor_sync(kAllLanes, own, 1);
  const T last = __shfl_sync(kAllLanes, own, 31);
  T upper = own;
  if (lane >= 16) upper = __shfl_xor_sync(0xffff0000u, own, 8);  // half of the warp
  __syncwarp();
  store(out + 3 * threadIdx.x, neighbour);
  store(out + 3 * threadIdx.x + 1, last);
  store(out + 3 * threadIdx.x + 2, upper);
}

template <typename T>
void check_shuffles(T first, T step) {
  std::vector<T> out(3 * 64);
  launch(shuffles<T>, 1, 64, nullptr, first, step, out.data());
  for (size_t thread = 0; thread < 64; ++thread) {
    const size_t lane = thread % 32;
    const auto expect = [&](size_t source, size_t column) {
      const T expected = first + step * static_cast<T>(source), got = out[3 * thread + column];
      require(got == expected, "shuffled value", static_cast<double>(got),
              static_cast<double>(expected));
    };
    expect(lane ^ 1, 0);
    expect(31, 1);
    expect(lane >= 16 ? lane ^ 8 : lane, 2);
  }
}

void check_all_shuffles() {
  check_shuffles<float>(0.5f, 1.0f);
  check_shuffles<double>(0.1, 1.0);
  check_shuffles<int>(-7, 3);
  check_shuffles<unsigned>(7, 3);
  check_shuffles<int64_t>(int64_t{1} << 60, -1);
  check_shuffles<uint64_t>(~uint64_t{0}, 2);
}

__global__ void record_turns(int* next_turn, int* turns) {
  const int block = static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y);
  __syncthreads();
  turns[(*next_turn)++] = block * 64 + static_cast<int>(threadIdx.x);
}

void check_schedules() {
  const auto turns = [](Order order, uint64_t seed) {
    int next_turn = 0;
    std::array<int, 4 * 64> result;
    set_schedule(order, seed);
    launch(record_turns, dim3(2, 2), 64, nullptr, &next_turn, result.data());
    return result;
  };
  const auto forward = turns(Order::kForward, 0), reverse = turns(Order::kReverse, 0);
  for (int i = 0; i < 256; ++i) {
    require(forward[static_cast<size_t>(i)] == i, "forward");
    require(reverse[static_cast<size_t>(i)] == 255 - i, "reverse");
  }
  const auto shuffled = turns(Order::kShuffled, 1);
  require(shuffled == turns(Order::kShuffled, 1), "a seed gives one schedule");
  require(shuffled != turns(Order::kShuffled, 2), "another seed gives another one");
  std::array<bool, 256> has_run{};
  for (const int turn : shuffled) has_run[static_cast<size_t>(turn)] = true;
  for (const bool has : has_run) require(has, "every thread has its turn");
}

__global__ void do_nothing() {}

void check_refused_launches() {
  read_counters();
  const auto refuses = [](dim3 grid, dim3 block) {
    return launch(do_nothing, grid, block, nullptr) == emulation::kInvalidConfiguration;
  };
  require(refuses(0, 32) && refuses(dim3(1, 0), 32) && refuses(dim3(1, 1, 0), 32), "empty grid");
  require(refuses(1, 0) && refuses(1, 1025), "block of 0 or 1025");
  require(refuses(kMaxGridX + 1, 32) && refuses(dim3(1, kMaxGridY + 1), 32), "too large a grid");
  require(read_counters().launches == 0, "nothing was launched");
  require(!refuses(kMaxGridX, 1024), "the largest");
  require(read_counters().launches == 1, "launched");
}

void check_arithmetic() {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  require(exp2_approx(-126.0f) == 0x1p-126f && exp2_approx(-126.5f) == 0.0f, "exp2_approx");
  require(exp2_approx(-INFINITY) == 0.0f && std::isnan(exp2_approx(kNaN)), "exp2_approx");
  require(widen_float16(0x3c00) == 1.0f, "widen_float16");
  require(narrow_bfloat16x2(1.0f, -2.0f) == 0xc0003f80u, "narrow_bfloat16x2");
  require(narrow_float16x2(1.0f, -2.0f) == 0xc0003c00u, "narrow_float16x2");
  // Halves: 1 and -2 against 2 and -1; NaN against 1, and against NaN; the two zeros.
  require(max_bfloat16x2(0xc0003f80u, 0xbf804000u) == 0xbf804000u, "max_bfloat16x2");
  require(max_bfloat16x2(0xffff7fc0u, 0x7fc13f80u) == 0x7fff3f80u, "max_bfloat16x2 of NaN");
  require(max_float16x2(0x00008000u, 0x80000000u) == 0u, "max_float16x2 of zeros");
  require(max_float16x2(0xfc007e00u, 0xc000fc00u) == 0xc000fc00u, "max_float16x2");
}

// ---- command line ---------------------------------------------------------------------------

struct Program {
  const char* name;
  void (*run)();
};

template <typename... Parameters, typename... Arguments>
void run_and_print_sum(void (*kernel)(Parameters...), dim3 grid, unsigned num_threads,
                       Arguments... arguments) {
  const size_t size = size_t{grid.x} * num_threads;
  const std::unique_ptr<float[]> out = make_floats(size, 0.0f);
  require(launch(kernel, grid, num_threads, nullptr, arguments..., out.get()) == 0, "launch");
  float sum = 0.0f;
  for (size_t i = 0; i < size; ++i) sum += out[i];
  std::printf("sum %g\n", static_cast<double>(sum));
}

const Program kPrograms[] = {
    {"misaligned-vector",
     [] { run_and_print_sum(misaligned_vector, 1, 32, make_floats(8).get()); }},
    {"misaligned-scalar", [] { run_and_print_sum(misaligned_scalar, 1, 32); }},
    {"divergent-barrier", [] { launch(divergent_barrier, 1, 64, nullptr); }},
    {"exit-before-barrier", [] { launch(exit_before_barrier, 1, 64, nullptr); }},
    {"exit-before-shuffle", [] { run_and_print_sum(exit_before_shuffle, 1, 64); }},
    {"deadlock", [] { launch(deadlock, 1, 32, nullptr); }},
    {"divergent-shuffle", [] { run_and_print_sum(divergent_shuffle, 1, 32); }},
    {"wrong-mask", [] { run_and_print_sum(wrong_mask, 1, 32); }},
    {"different-masks", [] { run_and_print_sum(different_masks, 1, 32); }},
    {"absent-source-lane", [] { run_and_print_sum(absent_source_lane, 1, 8); }},
    {"non-uniform-load", [] { run_and_print_sum(non_uniform_load, 1, 64, make_floats(2).get()); }},
    {"out-of-bounds-scalar",
     [] { run_and_print_sum(out_of_bounds_scalar, 1, 32, make_floats(32).get()); }},
    {"out-of-bounds-vector", [] { run_and_print_sum(out_of_bounds_vector, 1, 32); }},
    {"out-of-bounds-shared", [] { run_and_print_sum(out_of_bounds_shared, 1, 32); }},
    {"out-of-bounds-index", [] { run_and_print_sum(out_of_bounds_index, 1, 32); }},
    {"stale-shared-memory", [] { run_and_print_sum(stale_shared_memory, 2, 32); }},
    {"missing-barrier", [] { run_and_print_sum(missing_barrier, 1, 64); }},
    {"missing-second-barrier", [] { run_and_print_sum(missing_second_barrier, 1, 64); }},
    {"missing-warp-sync", [] { run_and_print_sum(missing_warp_sync, 1, 32); }},
    {"warp-sync-for-barrier", [] { run_and_print_sum(warp_sync_for_barrier, 1, 64); }},
    {"race-after-barrier", [] { run_and_print_sum(race_after_barrier, 1, 2); }},
    {"race-after-collective", [] { run_and_print_sum(race_after_collective, 1, 2); }},
    {"race-between-blocks", [] { run_and_print_sum(race_between_blocks, 2, 1); }},
    {"reductions", check_reductions},
    {"concurrent-launches", check_concurrent_launches},
    {"shuffles", check_all_shuffles},
    {"refused-launches", check_refused_launches},
    {"arithmetic", check_arithmetic},
    {"schedules", check_schedules},  // its kernel has a race, so it does not run under TSan
};

}  // namespace
}  // namespace simpo_ext::cuda

int main(int argc, char** argv) {
  // abort() is expected here.
  const rlimit no_core_file{0, 0};
  setrlimit(RLIMIT_CORE, &no_core_file);
  for (const simpo_ext::cuda::Program& program : simpo_ext::cuda::kPrograms) {
    if (argc != 2 || std::strcmp(argv[1], program.name) != 0) continue;
    program.run();
    std::puts("ok");
    return 0;
  }
  std::fputs("usage: faults NAME\n", stderr);
  return 2;
}
