// The exact number of bytes that a call loads and stores, from the memory contracts at the top of
// the kernels' files. A byte that all threads of a block load together counts once.
#pragma once

#include <cstdint>
#include <cstdio>

#include "emulator.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {

using emulation::Counters;

inline constexpr uint64_t kLabel = sizeof(int64_t), kDouble = sizeof(double),
                          kCount = sizeof(int64_t);

// Runs call() and compares its accesses with the expected ones.
template <typename Call>
void require_cost(const char* what, const Counters& expected, const Call& call) {
  emulation::read_counters();
  require_equal(call(), 0, what);
  const Counters got = emulation::read_counters();
  const struct {
    const char* name;
    uint64_t Counters::* counter;
  } counters[] = {{"launches", &Counters::launches},
                  {"bytes loaded", &Counters::bytes_loaded},
                  {"bytes stored", &Counters::bytes_stored},
                  {"16-byte loads", &Counters::vector_loads},
                  {"16-byte stores", &Counters::vector_stores}};
  for (const auto& [name, counter] : counters) {
    if (got.*counter == expected.*counter) continue;
    char message[80];
    std::snprintf(message, sizeof(message), "%s, %s", what, name);
    fail(message, static_cast<double>(got.*counter), static_cast<double>(expected.*counter));
  }
}

// Defined in bytes_of_pairs.cpp.
void check_bytes_of_pairs();

}  // namespace simpo_ext::kernel_tests
