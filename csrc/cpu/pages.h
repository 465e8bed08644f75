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

// For memory that was just allocated and has not been touched.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace simpo_ext::cpu
