// Reductions across the 32 lanes of a warp, in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/platform.h"

namespace simpo_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Combines the values of all lanes, by combine(mine, another lane's). If combine is commutative,
// every lane gets the result, otherwise only lane 0.
template <typename Value, typename Combine>
SIMPO_DEVICE Value reduce_warp(Value value, const Combine& combine) {
  SIMPO_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// The sum over the lanes before this one, and over all lanes.
struct SumInWarp {
  int before, all;
};

SIMPO_DEVICE SumInWarp add_in_warp(int value) {
  SumInWarp sum{0, value};
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  SIMPO_UNROLL
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_xor_sync(kWholeWarp, sum.all, distance);
    if ((lane & distance) != 0) sum.before += other;
    sum.all += other;
  }
  return sum;
}

// ---- structs of 8-byte members, shuffled and shared as words --------------------------------

template <typename Value>
constexpr int kWordsOf = sizeof(Value) / sizeof(uint64_t);

template <typename Value>
SIMPO_DEVICE void put_words(const Value& value, uint64_t* words) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) % sizeof(uint64_t) == 0);
  std::memcpy(words, static_cast<const void*>(&value), sizeof(value));
}

template <typename Value>
SIMPO_DEVICE Value from_words(const uint64_t* words) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) % sizeof(uint64_t) == 0);
  Value value;
  std::memcpy(static_cast<void*>(&value), words, sizeof(value));
  return value;
}

template <typename Value, typename Combine>
SIMPO_DEVICE Value reduce_warp_of_structs(Value value, const Combine& combine) {
  SIMPO_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    uint64_t words[kWordsOf<Value>];
    put_words(value, words);
    SIMPO_UNROLL
    for (int i = 0; i < kWordsOf<Value>; ++i) {
      words[i] = __shfl_xor_sync(kWholeWarp, words[i], distance);
    }
    value = combine(value, from_words<Value>(words));
  }
  return value;
}

}  // namespace simpo_ext::cuda
