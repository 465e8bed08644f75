// Runs CUDA kernels on the CPU, for tests. Every CUDA thread is a fiber, blocks run one at a time,
// and the test chooses the order of the threads that can run.
//
// Undefined behaviour on a real device is an error here: a message on stderr with thread, block,
// file and line, then abort(). README.md lists what the emulator checks, and what it cannot check.
//
// This header does not define CUDA's function names. cuda/platform.h does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Rewritten whenever a thread resumes. Not thread_local: compilers keep the address of a
// thread_local variable across a switch of fibers, and launches exclude each other anyway.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace simpo_ext::emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxBlockThreads = 1024;
// Much smaller than CUDA's 2^31 - 1, so that tests of ordinary size need the second grid dimension.
constexpr int64_t kMaxGridX = 64;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxGridZ = 65535;

// cudaErrorInvalidConfiguration.
constexpr int kInvalidConfiguration = 9;

// ---- for tests ------------------------------------------------------------------------------

// The order of the threads that can run, and of the blocks of a grid. With forward and reverse, a
// thread runs as far as it can before its neighbour starts.
enum class Order : int { kForward, kReverse, kShuffled };

// Applies to all later launches. Before the first call, the order is shuffled with seed 0.
void set_schedule(Order order, uint64_t seed);

// The accesses of the kernels to global memory.
struct Counters {
  uint64_t launches;
  uint64_t bytes_loaded;
  uint64_t bytes_stored;
  uint64_t vector_loads;   // of 16 bytes; their bytes are also counted above
  uint64_t vector_stores;  // the same
};

// The counters since the last call. Resets them to 0.
Counters read_counters();

// The same for ctypes. Returns 0, or another value if there is no such order.
extern "C" int simpo_emulation_set_schedule(int order, uint64_t seed);
extern "C" void simpo_emulation_read_counters(uint64_t out[5]);  // in the order of Counters

// Writes the addresses of up to capacity different kernels launched since the last call, and
// returns their number.
extern "C" size_t simpo_emulation_launched_kernels(const void** out, size_t capacity);

// ---- for cuda/platform.h --------------------------------------------------------------------

using SourceLocation = std::source_location;

// Calls thread_main(context) once for every thread of a kernel's grid. Returns 0, or the error of a
// configuration that CUDA would refuse. Launches by several OS threads run one after the other.
int run_grid(const void* kernel, dim3 grid, dim3 block, void (*thread_main)(const void* context),
             const void* context);

void wait_for_block(SourceLocation where);

// Waits for the lanes in mask, and returns the value that source_lane passed.
uint64_t exchange_in_warp(const char* operation, uint32_t mask, uint64_t value,
                          unsigned source_lane, SourceLocation where);

// The lane of the calling thread in its warp.
unsigned lane();

// The block's memory for the shared array with this identity. Its size is the one that the first
// thread asks for. All bytes are 0xFF, which is a NaN in every floating-point type.
void* shared_array(const void* identity, size_t bytes);

// Check the alignment and count the bytes. The access itself is in the kernel's translation unit,
// where the sanitizers see it.
void before_load(const void* address, size_t bytes, size_t alignment, SourceLocation where);
void before_uniform_load(const void* address, size_t bytes, size_t alignment, SourceLocation where);
void before_store(const void* address, size_t bytes, size_t alignment, SourceLocation where);

}  // namespace simpo_ext::emulation
