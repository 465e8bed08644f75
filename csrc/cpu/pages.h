// Memory for tensors so large that getting their pages takes longer than filling them: a page fault
// for each 4 KiB limits a write to a tenth of the memory's bandwidth. Huge pages are asked for, and
// whatever the system gives instead serves as well.
#pragma once

#include <cstddef>

namespace simpo_ext::cpu {

// Below this, an allocator hands out memory that it has used before.
constexpr std::size_t kLargeBytes = std::size_t{1} << 25;

// Zeros that take up no memory until they are written. Null: the system has none to give.
void* map_zeros(std::size_t bytes);
void unmap(void* data, std::size_t bytes);

// Memory for what is written whole, with whatever it holds: that of an earlier call where some
// fits, so that training steps do not wait for the same pages again and again. On a virtual
// machine, whose host takes free pages back, that wait may be a third of a step. Null: the system
// has none to give.
struct Mapping {
  void* data = nullptr;
  std::size_t bytes = 0;  // at least those asked for
};
Mapping map_for_writing(std::size_t bytes);
// For later calls of the above. Meanwhile the system may take the pages whenever it is short of
// memory; beyond kMostKept mappings, and kMostKeptBytes, what was kept first is unmapped.
void keep_for_writing(const Mapping& mapping);

constexpr std::size_t kMostKept = 4;
constexpr std::size_t kMostKeptBytes = std::size_t{1} << 32;

// For memory that was just allocated and has not been touched.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace simpo_ext::cpu
