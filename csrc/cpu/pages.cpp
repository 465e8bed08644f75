#include "cpu/pages.h"

#include <sys/mman.h>

#include <cstdint>

namespace simpo_ext::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

uintptr_t round_up(uintptr_t address) { return (address + kHugePage - 1) & ~(kHugePage - 1); }

void advise(uintptr_t begin, uintptr_t end) {
#if defined(MADV_HUGEPAGE)
  // A kernel without huge pages refuses, and pages are small then.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(begin);
  static_cast<void>(end);
#endif
}

}  // namespace

void* map_zeros(std::size_t bytes) {
  // One huge page more than needed, of which what lies outside of whole ones is given back.
  const uintptr_t length = round_up(bytes);
  void* const mapped =
      mmap(nullptr, length + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped), aligned = round_up(begin);
  if (aligned > begin) munmap(mapped, aligned - begin);
  munmap(reinterpret_cast<void*>(aligned + length), begin + kHugePage - aligned);
  advise(aligned, aligned + length);
  return reinterpret_cast<void*>(aligned);
}

void unmap(void* data, std::size_t bytes) { munmap(data, round_up(bytes)); }

void advise_huge_pages(void* data, std::size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  advise(round_up(begin), (begin + bytes) & ~(kHugePage - 1));
}

}  // namespace simpo_ext::cpu
