// A run of elements inside memory that must not be accessed. The memory around it is poisoned, and
// its contents are checked. The pages before and after fault on access, because AddressSanitizer
// does not check masked loads and streaming stores.
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
  // Has space for runs of up to capacity elements that start up to 64 bytes after the first page.
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

  // n elements. The first is start elements after the page before the space.
  T* place(int64_t start, int64_t n) {
    return place_at(room_ + static_cast<size_t>(start) * sizeof(T), n);
  }
  // n elements. The last is directly before the page after the space.
  T* place_last(int64_t n) {
    return place_at(room_ + bytes_ - static_cast<size_t>(n) * sizeof(T), n);
  }

  // Call before the next run.
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
    // Two of the widest vectors on both sides.
    front_ = std::max(room_, begin_ - std::min<std::ptrdiff_t>(128, begin_ - room_));
    back_ = end_ + std::min<std::ptrdiff_t>(128, room_ + bytes_ - end_);
    UNPOISON(room_, bytes_);
    std::memset(front_, kCanary, static_cast<size_t>(begin_ - front_));
    std::memset(end_, kCanary, static_cast<size_t>(back_ - end_));
    POISON(room_, bytes_);
    // AddressSanitizer poisons groups of 8 bytes. Bytes in the group of the first element are only
    // checked for their contents.
    UNPOISON(begin_, static_cast<size_t>(end_ - begin_));
    return reinterpret_cast<T*>(begin_);
  }

  size_t page_, bytes_;
  char* room_;
  char *front_ = nullptr, *begin_ = nullptr, *end_ = nullptr, *back_ = nullptr;
};

}  // namespace simpo_ext::test
