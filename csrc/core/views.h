// How kernels find a token's data. Strides are in elements, and offsets are int64: B * T * V passes
// 2^31 at ordinary sizes.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace simpo_ext {

// Of a [B, T] or [B, T, V] tensor; a stride of 0 (an expanded tensor) is an ordinary case.
struct TokenStrides {
  int64_t b;
  int64_t t;

  SIMPO_HOST_DEVICE int64_t offset(int64_t row_b, int64_t row_t) const {
    return row_b * b + row_t * t;
  }
};

// Which label the logits at (b, t) are scored with. With shift, position t predicts labels[b, t +
// 1], and the last position predicts nothing.
struct Targets {
  const int64_t* labels;  // [B, T]
  TokenStrides strides;
  int64_t B;
  int64_t T;
  int64_t ignore_index;
  bool shift;

  SIMPO_HOST_DEVICE int64_t label_position(int64_t t) const { return shift ? t + 1 : t; }

  // Whether a label is there for (b, t) to be scored with; only then is label_offset(b, t) that of
  // one.
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

// The sequences of a batch: its rows, or, in the flat layout, parts of its only row, sequence s the
// positions [cu_seqlens[s], cu_seqlens[s + 1]).
struct Sequences {
  const int64_t* cu_seqlens;  // [S + 1]; null: rows
  int64_t S;
};

// Pair p is of sequences chosen(p) and rejected(p); without indices, of p and P + p.
struct Pairs {
  const int64_t* indices;  // [P, 2] contiguous, or null
  const double* weights;   // [P] contiguous, or null: 1
  int64_t P;
};

// The first thing that is wrong with a layout.
struct LayoutError {
  enum class Kind { kNone, kBegin, kOrder, kEnd, kPair };

  Kind kind = Kind::kNone;
  int64_t index = 0;  // into cu_seqlens, or of a pair times two plus the side
  int64_t value = 0;
  int64_t bound = 0;  // what it was held against

  bool found() const { return kind != Kind::kNone; }
};

// The first label that is neither ignore_index nor in [0, V); b < 0: there is none.
struct LabelError {
  int64_t b = -1;
  int64_t position = -1;
  int64_t label = 0;

  bool found() const { return b >= 0; }
};

}  // namespace simpo_ext
