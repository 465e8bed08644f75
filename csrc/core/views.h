// How kernels find the data of a token. Strides are in elements. Offsets are int64, because B * T *
// V exceeds 2^31 at ordinary sizes.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace simpo_ext {

// The strides of a [B, T] or [B, T, V] tensor. They may be 0, for an expanded tensor.
struct TokenStrides {
  int64_t b;
  int64_t t;

  SIMPO_HOST_DEVICE int64_t offset(int64_t row_b, int64_t row_t) const {
    return row_b * b + row_t * t;
  }
};

// Which label scores the logits at (b, t). With shift, it is labels[b, t + 1], and the last
// position has none.
struct Targets {
  const int64_t* labels;  // [B, T]
  TokenStrides strides;
  int64_t B;
  int64_t T;
  int64_t ignore_index;
  bool shift;

  SIMPO_HOST_DEVICE int64_t label_position(int64_t t) const { return shift ? t + 1 : t; }

  // Whether there is a label for (b, t). If not, label_offset(b, t) must not be read.
  SIMPO_HOST_DEVICE bool has_label(int64_t t) const { return label_position(t) < T; }

  SIMPO_HOST_DEVICE int64_t label_offset(int64_t b, int64_t t) const {
    return strides.offset(b, label_position(t));
  }

  SIMPO_HOST_DEVICE int64_t at(int64_t b, int64_t t) const {
    return has_label(t) ? labels[label_offset(b, t)] : ignore_index;
  }

  SIMPO_HOST_DEVICE bool is_valid(int64_t b, int64_t t) const { return at(b, t) != ignore_index; }
};

// Positions [begin, end) of row b.
struct TokenRange {
  int64_t b;
  int64_t begin;
  int64_t end;
};

// The sequences of a batch: its rows, or, in the flat layout, parts of its single row. Then
// sequence s has the positions [cu_seqlens[s], cu_seqlens[s + 1]).
struct Sequences {
  const int64_t* cu_seqlens;  // [S + 1]; null: rows
  int64_t S;
};

// Pair p has the sequences indices[p, 0] and indices[p, 1], or p and P + p without indices.
struct Pairs {
  const int64_t* indices;  // [P, 2] contiguous, or null
  const double* weights;   // [P] contiguous, or null: 1
  int64_t P;
};

// The first error of a layout.
struct LayoutError {
  enum class Kind { kNone, kBegin, kOrder, kEnd, kPair };

  Kind kind = Kind::kNone;
  int64_t index = 0;  // into cu_seqlens, or into the flattened pairs
  int64_t value = 0;
  int64_t bound = 0;  // the limit that the value breaks

  bool found() const { return kind != Kind::kNone; }
};

// The first label that is neither ignore_index nor in [0, V). b < 0 if there is none.
struct LabelError {
  int64_t b = -1;
  int64_t position = -1;
  int64_t label = 0;

  bool found() const { return b >= 0; }
};

}  // namespace simpo_ext
