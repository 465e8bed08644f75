// Memory for large tensors. With a page fault for each 4 KiB, writing them reaches a tenth of the
// memory's bandwidth. These functions ask for huge pages, and also work without them.
#pragma once

#include <cstddef>

namespace simpo_ext::cpu {

// For smaller blocks, the allocator reuses memory whose pages are already mapped.
constexpr std::size_t kLargeBytes = std::size_t{1} << 25;

// Zeros that take up no memory until they are written. Null if the system has no memory.
void* map_zeros(std::size_t bytes);
void unmap(void* data, std::size_t bytes);

// Memory with arbitrary contents, for tensors that are written completely. It reuses the memory of
// an earlier call that fits, so that training steps do not wait for the same pages again. On a
// virtual machine whose host takes free pages back, that wait can be a third of a step. data is
// null if the system has no memory.
struct Mapping {
  void* data = nullptr;
  std::size_t bytes = 0;  // may be more than requested
};
Mapping map_for_writing(std::size_t bytes);
// Keeps a mapping for later calls of map_for_writing. Meanwhile the system may take the pages back
// if it is short of memory. Unmaps the oldest mappings beyond kMostKept or kMostKeptBytes.
void keep_for_writing(const Mapping& mapping);

constexpr std::size_t kMostKept = 4;
constexpr std::size_t kMostKeptBytes = std::size_t{1} << 32;

// Asks for huge pages. The memory must not have been written yet.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace simpo_ext::cpu
