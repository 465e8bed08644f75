// What the kernels around hidden states share: R rows for the valid tokens of a batch, with a
// thread or a block of threads for each row.
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

// With four 16-byte vectors for each thread: 8 KB, a row of 4096 2-byte elements.
constexpr int kRowThreads = 128;
constexpr int kRowBlocksPerSM = 8;  // leaves 64 registers a thread

SIMPO_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// ---- sums beside vectors of T ---------------------------------------------------------------

// Compute values beside a vector of T: one vector of them, or two.
template <typename T>
struct Sums {
  using Scalar = Compute<T>;
  static constexpr int kVectors = sizeof(Scalar) / sizeof(T);
  static constexpr int kWidth = Elements<Scalar>::kWidth;
  Vector16 v[kVectors];

  // The vectors beside vector i. Two loads share a line, and the first-level cache has the second.
  SIMPO_DEVICE void load_from(const Vector16* sums, int64_t i) {
    SIMPO_UNROLL
    for (int j = 0; j < kVectors; ++j) v[j] = load_cached(sums + i * kVectors + j);
  }
  SIMPO_DEVICE Scalar get(int k) const { return Elements<Scalar>::get(v[k / kWidth], k % kWidth); }
};

}  // namespace simpo_ext::cuda
