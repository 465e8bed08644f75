// Memory of exactly the size that a contract states, so that AddressSanitizer reports an access
// beyond it. Bytes that must not be read are poisoned. Bytes that must not be written hold a
// pattern, which is checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "../../cpp/poison.h"
#include "core/views.h"

namespace simpo_ext::kernel_tests {

constexpr unsigned char kUnwritten = 0xa5;

template <typename T>
bool is_unwritten(const T& value) {
  unsigned char pattern[sizeof(T)];
  std::memset(pattern, kUnwritten, sizeof(T));
  return std::memcmp(static_cast<const void*>(&value), pattern, sizeof(T)) == 0;
}

// count elements. The first one is front elements after a 16-byte boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t front = 0)
      : count_(count), front_(front), memory_(::operator new(num_bytes(), std::align_val_t{16})) {
    std::memset(memory_.get(), kUnwritten, num_bytes());
  }

  T* data() const { return static_cast<T*>(memory_.get()) + front_; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }

  // For all the memory, including the front.
  unsigned char* bytes() const { return static_cast<unsigned char*>(memory_.get()); }
  size_t num_bytes() const { return static_cast<size_t>(front_ + count_) * sizeof(T); }

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{16}); }
  };
  int64_t count_, front_;
  std::unique_ptr<void, Free> memory_;
};

// Where the rows of a [B, T, V] tensor are in memory, in elements.
struct Layout {
  int64_t front = 0;  // from a 16-byte boundary to the first row
  int64_t pad_t = 0;  // between rows
  int64_t pad_b = 0;  // between sequences, in addition to pad_t
};

template <typename T>
class Rows {
 public:
  Rows(int64_t B, int64_t num_positions, int64_t V, Layout layout)
      : B_(B),
        T_(num_positions),
        V_(V),
        strides_{num_positions * (V + layout.pad_t) + layout.pad_b, V + layout.pad_t},
        buffer_(B * num_positions == 0 ? 0 : strides_.offset(B - 1, num_positions - 1) + V,
                layout.front) {}

  TokenStrides strides() const { return strides_; }
  T* data() const { return buffer_.data(); }
  T* row(int64_t b, int64_t t) const { return buffer_.data() + strides_.offset(b, t); }
  const Buffer<T>& buffer() const { return buffer_; }

  // Poisons all rows except those with may_read(b, t). AddressSanitizer poisons groups of 8 bytes,
  // so a row that shares a group with a readable row is not poisoned there.
  template <typename Predicate>
  void forbid_reads_unless(const Predicate& may_read) const {
    POISON(buffer_.bytes(), buffer_.num_bytes());
    for_each_row([&](int64_t b, int64_t t, T* x) {
      if (may_read(b, t)) UNPOISON(x, static_cast<size_t>(V_) * sizeof(T));
    });
  }
  void permit_reads() const { UNPOISON(buffer_.bytes(), buffer_.num_bytes()); }

  template <typename Function>
  void for_each_row(const Function& function) const {
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t t = 0; t < T_; ++t) function(b, t, row(b, t));
    }
  }

  // Calls function(begin, bytes) for the memory before, between and after rows.
  template <typename Function>
  void for_each_gap(const Function& function) const {
    unsigned char* begin = buffer_.bytes();
    const auto gap_until = [&](void* end) {
      function(begin, static_cast<size_t>(static_cast<unsigned char*>(end) - begin));
    };
    for_each_row([&](int64_t, int64_t, T* x) {
      gap_until(x);
      begin = reinterpret_cast<unsigned char*>(x + V_);
    });
    gap_until(buffer_.bytes() + buffer_.num_bytes());
  }

  bool are_gaps_unwritten() const {
    bool is_unwritten = true;
    for_each_gap([&](const unsigned char* bytes, size_t count) {
      for (size_t i = 0; i < count; ++i) is_unwritten = is_unwritten && bytes[i] == kUnwritten;
    });
    return is_unwritten;
  }

 private:
  int64_t B_, T_, V_;
  TokenStrides strides_;
  Buffer<T> buffer_;
};

}  // namespace simpo_ext::kernel_tests
