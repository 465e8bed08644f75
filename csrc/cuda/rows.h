// How a grid covers token rows, and how the threads of a block cover a row.
#pragma once

#include <cstdint>

#include "core/views.h"
#include "cuda/elements.h"
#include "cuda/platform.h"

namespace simpo_ext::cuda {

// A grid with z blocks for each of count > 0 rows. If the first dimension is too small for all
// rows, the second divides them into equal parts, so that fewer than gridDim.y blocks have no row.
inline dim3 grid_of_rows(int64_t count, unsigned z = 1) {
  const int64_t y = (count + kMaxGridX - 1) / kMaxGridX;
  const int64_t x = (count + y - 1) / y;
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), z);
}

// The row of this block; >= count if the block has none.
SIMPO_DEVICE int64_t row_of_block() {
  return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
}

struct Token {
  int64_t b, t;
};

SIMPO_DEVICE Token token_of_row(int64_t row, int64_t T) {
  if (((row | T) >> 32) == 0) {  // 64-bit division is slow
    const uint32_t b = static_cast<uint32_t>(row) / static_cast<uint32_t>(T);
    return {b, row - b * T};
  }
  return {row / T, row % T};
}

// The label of a token. All threads of the block must ask for the same token.
SIMPO_DEVICE int64_t uniform_label_at(const Targets& targets, Token token) {
  if (!targets.has_label(token.t)) return targets.ignore_index;
  return load_uniform(targets.labels + targets.label_offset(token.b, token.t));
}

SIMPO_DEVICE bool is_in_vocabulary(int64_t label, int64_t V) {
  return static_cast<uint64_t>(label) < static_cast<uint64_t>(V);
}

// Whether a label is in [first_label, first_label + V). The label may have any value.
SIMPO_DEVICE bool is_in_part(int64_t label, int64_t first_label, int64_t V) {
  return static_cast<uint64_t>(label) - static_cast<uint64_t>(first_label) <
         static_cast<uint64_t>(V);
}

// A row cut for 16-byte access: up to kWidth - 1 elements before the first aligned one, then whole
// vectors, then up to kWidth - 1 elements. Vector i belongs to thread i % kThreads. The single
// elements at both ends are the edges, numbered from 0, and edge i belongs to thread i. For short
// rows, Index can be int, which takes fewer registers.
template <typename T, typename Index = int64_t>
class RowCut {
 public:
  static constexpr int kWidth = Elements<T>::kWidth;

  SIMPO_DEVICE RowCut(const T* row, Index V) : V_(V) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    const Index to_boundary = static_cast<Index>((16 - address % 16) % 16 / sizeof(T));
    head_ = to_boundary < V ? to_boundary : V;
    num_vectors_ = (V - head_) / kWidth;
  }

  SIMPO_DEVICE Index num_vectors() const { return num_vectors_; }
  SIMPO_DEVICE Index num_edges() const { return V_ - num_vectors_ * kWidth; }

  SIMPO_DEVICE const Vector16* vectors(const T* row) const {
    return reinterpret_cast<const Vector16*>(row + head_);
  }
  SIMPO_DEVICE Vector16* vectors(T* row) const { return reinterpret_cast<Vector16*>(row + head_); }

  SIMPO_DEVICE Index element_of_edge(Index edge) const {
    return edge < head_ ? edge : edge + num_vectors_ * kWidth;
  }

  SIMPO_DEVICE Index thread_of_element(Index element, Index num_threads) const {
    if (element < head_) return element;
    const Index vector = (element - head_) / kWidth;
    if (vector < num_vectors_) return vector % num_threads;
    return element - num_vectors_ * kWidth;
  }

 private:
  Index V_, head_, num_vectors_;
};

// ---- segments of a row, which blocks may share ----------------------------------------------

constexpr int64_t kSegmentBytes = 65536;

template <typename T>
constexpr int64_t kSegmentColumns = kSegmentBytes / static_cast<int64_t>(sizeof(T));

// The number of segments of a row of V logits, at least one. It depends only on V, so that the bits
// of a row's sum do not depend on the number of rows.
template <typename T>
SIMPO_HOST_DEVICE inline int num_segments(int64_t V) {
  return V <= kSegmentColumns<T>
             ? 1
             : static_cast<int>((V + kSegmentColumns<T> - 1) / kSegmentColumns<T>);
}

// If there are fewer rows than kBusyBlocks, several blocks share each row.
inline unsigned blocks_per_row(int64_t N, int num_segments) {
  if (N == 0 || N >= kBusyBlocks) return 1;
  const int64_t wanted = (kBusyBlocks + N - 1) / N;
  const int64_t blocks = wanted < num_segments ? wanted : num_segments;
  const int64_t segments_each = (num_segments + blocks - 1) / blocks;
  return static_cast<unsigned>((num_segments + segments_each - 1) / segments_each);
}

// The segments of a row of V logits: one, or num_segments(V). Blocks that share a row take equal
// shares of its segments, in the order of blockIdx.z.
template <typename T, bool kIsOne, bool kMayBeShared>
class RowSegments {
 public:
  SIMPO_DEVICE explicit RowSegments(int64_t V)
      : V_(V), count_(kIsOne ? 1 : num_segments<T>(V)), begin_(0), end_(count_) {
    if (kIsOne || !kMayBeShared || gridDim.z == 1) return;
    const int blocks = static_cast<int>(gridDim.z);
    const int share = (count_ + blocks - 1) / blocks;
    begin_ = static_cast<int>(blockIdx.z) * share;
    end_ = begin_ + share < count_ ? begin_ + share : count_;
  }

  SIMPO_DEVICE int begin_of_block() const { return begin_; }
  SIMPO_DEVICE int end_of_block() const { return end_; }

  SIMPO_DEVICE int64_t first_column(int segment) const { return segment * kSegmentColumns<T>; }
  SIMPO_DEVICE int columns(int segment) const {
    return static_cast<int>(segment + 1 < count_ ? kSegmentColumns<T> : V_ - first_column(segment));
  }
  SIMPO_DEVICE int64_t first_column_of_block() const { return first_column(begin_of_block()); }
  SIMPO_DEVICE int64_t columns_of_block() const {
    return (end_ < count_ ? first_column(end_) : V_) - first_column_of_block();
  }

 private:
  int64_t V_;
  int count_, begin_, end_;
};

// row[0, V) = value. All kThreads threads of a block must call it.
template <typename T, int kThreads>
SIMPO_DEVICE void fill_row(T* row, int64_t V, Compute<T> value) {
  constexpr int kWidth = Elements<T>::kWidth;
  const RowCut<T> cut(row, V);
  Compute<T> values[kWidth];
  SIMPO_UNROLL
  for (int k = 0; k < kWidth; ++k) values[k] = value;
  const Vector16 v = Elements<T>::pack(values);
  const int64_t tid = threadIdx.x;
  for (int64_t i = tid; i < cut.num_vectors(); i += kThreads)
    store_streaming(cut.vectors(row) + i, v);
  if (tid < cut.num_edges()) store(row + cut.element_of_edge(tid), Elements<T>::narrow(value));
}

}  // namespace simpo_ext::cuda
