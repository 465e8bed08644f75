#include "cpu/pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <vector>

namespace simpo_ext::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

uintptr_t round_up(uintptr_t address) { return (address + kHugePage - 1) & ~(kHugePage - 1); }

void advise(uintptr_t begin, uintptr_t end) {
#if defined(MADV_HUGEPAGE)
  // Errors are ignored: on a system without huge pages, the pages stay small.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(begin);
  static_cast<void>(end);
#endif
}

// Mappings for later calls, the oldest first.
struct Kept {
  std::mutex mutex;
  std::vector<Mapping> mappings;
};

// Never destroyed: a tensor may be freed when the process ends.
Kept& kept() {
  static Kept* const instance = new Kept;
  return *instance;
}

// Lets the system take pages back when it is short of memory. The others keep their contents.
bool offer_to_system(const Mapping& mapping) {
#if defined(MADV_FREE)
  return madvise(mapping.data, mapping.bytes, MADV_FREE) == 0;
#else
  static_cast<void>(mapping);
  return false;
#endif
}

}  // namespace

Mapping map_for_writing(std::size_t bytes) {
  const uintptr_t length = round_up(bytes);
  {
    const std::lock_guard lock(kept().mutex);
    std::vector<Mapping>& mappings = kept().mappings;
    // The smallest mapping that fits, if it is at most twice as large as needed.
    auto best = mappings.end();
    for (auto each = mappings.begin(); each != mappings.end(); ++each) {
      const bool fits = each->bytes >= length && each->bytes / 2 <= length;
      if (fits && (best == mappings.end() || each->bytes <= best->bytes)) best = each;
    }
    if (best != mappings.end()) {
      const Mapping mapping = *best;
      mappings.erase(best);
      return mapping;
    }
  }
  return {map_zeros(length), length};
}

void keep_for_writing(const Mapping& mapping) {
  std::vector<Mapping> unwanted;
  if (offer_to_system(mapping)) {
    const std::lock_guard lock(kept().mutex);
    std::vector<Mapping>& mappings = kept().mappings;
    mappings.push_back(mapping);
    std::size_t bytes = 0;
    for (const Mapping& each : mappings) bytes += each.bytes;
    while (mappings.size() > kMostKept || bytes > kMostKeptBytes) {
      bytes -= mappings.front().bytes;
      unwanted.push_back(mappings.front());
      mappings.erase(mappings.begin());
    }
  } else {
    unwanted.push_back(mapping);
  }
  for (const Mapping& each : unwanted) unmap(each.data, each.bytes);
}

void* map_zeros(std::size_t bytes) {
  // Maps one huge page more than needed, and unmaps what lies before and after the aligned part.
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
