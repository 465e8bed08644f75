// A run of elements between memory that must not be touched. What lies around it is poisoned, and
// has to hold what it held before; a page that faults stands in front of the room and behind it,
// since AddressSanitizer does not watch masked loads, nor stores past the caches.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../poison.h"
#include "check.h"

namespace simpo_ext::test {

template <typename T>
class Fence {
 public:
  // Room for runs of up to capacity elements, starting up to 64 bytes after the first page.
  explicit Fence(int64_t capacity)
      : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))),
        bytes_((static_cast<size_t>(capacity) * sizeof(T) + 64 + page_ - 1) / page_ * page_) {
    void* mapped = mmap(nullptr, bytes_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(mapped != MAP_FAILED, "memory for the test");
    room_ = static_cast<char*>(mapped) + page_;
    require(mprotect(room_, bytes_, PROT_READ | PROT_WRITE) == 0, "memory for the test");
  }
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  ~Fence() {
    UNPOISON(room_, bytes_);
    munmap(room_ - page_, bytes_ + 2 * page_);
  }

  // n elements, the first of them start elements behind the page in front.
  T* place(int64_t start, int64_t n) {
    return place_at(room_ + static_cast<size_t>(start) * sizeof(T), n);
  }
  // n elements, the last of them right in front of the page behind.
  T* place_last(int64_t n) {
    return place_at(room_ + bytes_ - static_cast<size_t>(n) * sizeof(T), n);
  }

  // To be called before the next run is placed.
  void require_untouched() const {
    UNPOISON(room_, bytes_);
    for (const char* p = front_; p < begin_; ++p) require(*p == kCanary, "written in front");
    for (const char* p = end_; p < back_; ++p) require(*p == kCanary, "written behind");
  }

 private:
  static constexpr char kCanary = 0x5a;

  T* place_at(char* begin, int64_t n) {
    begin_ = begin;
    end_ = begin + static_cast<size_t>(n) * sizeof(T);
    // Two vectors of the widest to either side.
    front_ = std::max(room_, begin_ - std::min<std::ptrdiff_t>(128, begin_ - room_));
    back_ = end_ + std::min<std::ptrdiff_t>(128, room_ + bytes_ - end_);
    UNPOISON(room_, bytes_);
    std::memset(front_, kCanary, static_cast<size_t>(begin_ - front_));
    std::memset(end_, kCanary, static_cast<size_t>(back_ - end_));
    POISON(room_, bytes_);
    // Poison is kept per 8 bytes: what shares those of the first element is left to the canary.
    UNPOISON(begin_, static_cast<size_t>(end_ - begin_));
    return reinterpret_cast<T*>(begin_);
  }

  size_t page_, bytes_;
  char* room_;
  char *front_ = nullptr, *begin_ = nullptr, *end_ = nullptr, *back_ = nullptr;
};

}  // namespace simpo_ext::test
