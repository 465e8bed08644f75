// Memory for large tensors: it is zero, all of it is usable, and it takes up no memory before it is
// written.

#include "cpu/pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"

namespace simpo_ext::test {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

// The number of pages in the process's address space. Does not use the C library's streams, which
// allocate.
long mapped_pages() {
  char text[64] = {};
  const int file = open("/proc/self/statm", O_RDONLY);
  require(file >= 0 && read(file, text, sizeof(text) - 1) > 0, "/proc/self/statm");
  close(file);
  return std::atol(text);
}

struct Residency {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages;

  explicit Residency(size_t bytes) : pages((bytes + page - 1) / page) {}

  bool is_mapped(void* data) { return mincore(data, pages.size() * page, pages.data()) == 0; }

  size_t bytes(void* data) {
    require(is_mapped(data), "the memory is mapped");
    const auto resident = [](unsigned char flags) { return (flags & 1) != 0; };
    return static_cast<size_t>(std::count_if(pages.begin(), pages.end(), resident)) * page;
  }
};

void check_mapping(size_t bytes) {
  context = "a mapping of " + std::to_string(bytes) + " bytes";
  Residency residency(bytes);
  const long before = mapped_pages();
  char* data = static_cast<char*>(cpu::map_zeros(bytes));
  require(data != nullptr, "there is memory");
  const long room = static_cast<long>((bytes + kHugePage - 1) / kHugePage * kHugePage);
  require(mapped_pages() - before <= room / static_cast<long>(residency.page),
          "no more than whole huge pages", static_cast<double>(mapped_pages() - before));
  require(reinterpret_cast<uintptr_t>(data) % 64 == 0, "aligned to a cache line");
  require(residency.bytes(data) == 0, "nothing is taken before it is written",
          static_cast<double>(residency.bytes(data)));
  // A byte in the middle takes up one page, small or huge, with zeros around it.
  data[bytes / 2] = 1;
  require(residency.bytes(data) <= kHugePage, "one page is taken",
          static_cast<double>(residency.bytes(data)));
  for (size_t i = 0; i < bytes; ++i) require(data[i] == (i == bytes / 2), "zeros");
  std::memset(data, 0x5a, bytes);
  require(data[bytes - 1] == 0x5a, "writable to the last byte");
  cpu::unmap(data, bytes);
  require(!residency.is_mapped(data) && errno == ENOMEM, "it is given back");
  require(mapped_pages() == before, "all of it", static_cast<double>(mapped_pages() - before));
}

// Kept mappings are reused if they fit, and no more are kept than documented.
void check_reuse() {
  context = "memory used again";
  const size_t bytes = 4 * kHugePage - 100;
  const long before = mapped_pages();
  const cpu::Mapping first = cpu::map_for_writing(bytes);
  require(first.data != nullptr && first.bytes >= bytes, "room for all of it");
  std::memset(first.data, 0x5a, bytes);
  cpu::keep_for_writing(first);
  const cpu::Mapping larger = cpu::map_for_writing(first.bytes + 1);
  require(larger.data != first.data && larger.bytes > first.bytes, "too small a one is not taken");
  const cpu::Mapping smaller = cpu::map_for_writing(kHugePage);
  require(smaller.data != first.data, "nor one that is more than twice too large");
  const cpu::Mapping again = cpu::map_for_writing(bytes - kHugePage);
  require(again.data == first.data && again.bytes == first.bytes, "but the one that fits");
  const cpu::Mapping other = cpu::map_for_writing(bytes);
  require(other.data != first.data, "by one at a time");
  std::memset(again.data, 0x5b, again.bytes);
  require(static_cast<char*>(again.data)[again.bytes - 1] == 0x5b, "writable to its last byte");

  // The smallest one that fits.
  cpu::keep_for_writing(larger);
  cpu::keep_for_writing(again);
  const cpu::Mapping best = cpu::map_for_writing(bytes);
  require(best.data == again.data, "the smallest that fits");
  for (const cpu::Mapping& each : {smaller, other, best}) cpu::keep_for_writing(each);
  // Beyond the limit, the oldest mappings are unmapped, and their address space is free.
  std::vector<cpu::Mapping> many;
  for (size_t i = 0; i < 2 * cpu::kMostKept; ++i) many.push_back(cpu::map_for_writing(bytes));
  for (const cpu::Mapping& each : many) cpu::keep_for_writing(each);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const long room = static_cast<long>(cpu::kMostKept * (bytes + kHugePage) / page);
  require(mapped_pages() - before <= room + 64, "no more than so many are kept",
          static_cast<double>(mapped_pages() - before), static_cast<double>(room));
  // The limit of bytes, with address space that is never written.
  const cpu::Mapping most = cpu::map_for_writing(cpu::kMostKeptBytes + 1);
  require(most.data != nullptr, "address space");
  cpu::keep_for_writing(most);
  Residency residency(kHugePage);
  require(!residency.is_mapped(most.data), "too large a one is given back");
}

}  // namespace

void check_pages() {
  check_reuse();
  // Sizes near a page and a huge page; several huge pages and an odd rest; the smallest size in
  // use.
  for (const size_t bytes : {size_t{1}, size_t{4095}, size_t{4096}, size_t{4097}, kHugePage - 1,
                             kHugePage, kHugePage + 1, 3 * kHugePage + 12345, cpu::kLargeBytes}) {
    check_mapping(bytes);
  }
  context = "an empty mapping";
  const long before = mapped_pages();
  cpu::unmap(cpu::map_zeros(0), 0);
  require(mapped_pages() == before, "nothing is left");
  context = "more than there is";
  require(cpu::map_zeros(size_t{1} << 60) == nullptr, "null");
  // Less than a huge page, no whole one, and several: only the speed may change.
  for (const size_t bytes : {size_t{0}, size_t{100}, kHugePage + 5, 4 * kHugePage + 5}) {
    context = "advice for " + std::to_string(bytes) + " bytes";
    std::vector<char> memory(bytes + 1);
    cpu::advise_huge_pages(memory.data() + 1, bytes);
    for (const char byte : memory) require(byte == 0, "advice changes no value");
  }
  context.clear();
}

}  // namespace simpo_ext::test
