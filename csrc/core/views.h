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

// The first label that is neither ignore_index nor in [0, V); b < 0: there is none.
struct LabelError {
  int64_t b = -1;
  int64_t position = -1;
  int64_t label = 0;

  bool found() const { return b >= 0; }
};

}  // namespace simpo_ext
