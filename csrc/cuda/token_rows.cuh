// Shared by the kernels for hidden states, whose R rows are the valid tokens of a batch. A row has
// a thread or a block of threads.
#pragma once

#include <cstdint>

#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"

namespace simpo_ext::cuda {

// ---- a thread for each row ------------------------------------------------------------------

constexpr int kRowsPerBlock = 256;

inline dim3 grid_of_threads(int64_t R) {
  return grid_of_rows((R + kRowsPerBlock - 1) / kRowsPerBlock);
}

SIMPO_DEVICE int64_t row_of_thread() { return row_of_block() * kRowsPerBlock + threadIdx.x; }

// ---- a block for each row -------------------------------------------------------------------

// Four 16-byte vectors for each thread are 8 KB, a row of 4096 2-byte elements.
constexpr int kRowThreads = 128;
constexpr int kRowBlocksPerSM = 8;  // 64 registers for each thread

SIMPO_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// ---- sums for vectors of T ------------------------------------------------------------------

// The compute values for a vector of T: one vector, or two.
template <typename T>
struct Sums {
  using Scalar = Compute<T>;
  static constexpr int kVectors = sizeof(Scalar) / sizeof(T);
  static constexpr int kWidth = Elements<Scalar>::kWidth;
  Vector16 v[kVectors];

  // Loads the values for vector i. Two loads share a cache line, so the second one is a hit in the
  // first-level cache.
  SIMPO_DEVICE void load_from(const Vector16* sums, int64_t i) {
    SIMPO_UNROLL
    for (int j = 0; j < kVectors; ++j) v[j] = load_cached(sums + i * kVectors + j);
  }
  SIMPO_DEVICE Scalar get(int k) const { return Elements<Scalar>::get(v[k / kWidth], k % kWidth); }
};

}  // namespace simpo_ext::cuda
