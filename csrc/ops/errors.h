// Errors of ops that the front ends throw as IndexError or ValueError: they start with a tag. Other
// errors of ops come from STD_TORCH_CHECK and have no tag.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/kernels.h"
#include "simpo_ext/error_tags.h"

namespace simpo_ext::ops {

// If torch does not convert C++ exceptions, a direct call of the op in Python raises an IndexError
// for std::out_of_range and a ValueError for std::invalid_argument.
[[noreturn]] inline void throw_index_error(const std::string& message) {
  throw std::out_of_range(kIndexErrorTag + message);
}
[[noreturn]] inline void throw_value_error(const std::string& message) {
  throw std::invalid_argument(kValueErrorTag + message);
}

// ---- errors that kernels return -------------------------------------------------------------

inline void check_labels_in_range(const LabelError& error, int64_t ignore_index, int64_t V,
                                  bool is_flat = false) {
  if (!error.found()) return;
  const std::string row = is_flat ? "" : std::to_string(error.b) + ", ";
  throw_index_error("labels[" + row + std::to_string(error.position) +
                    "] is out of range: expected ignore_index (" + std::to_string(ignore_index) +
                    ") or a value in [0, " + std::to_string(V) + "), got " +
                    std::to_string(error.label));
}

inline void check_layout(const LayoutError& error) {
  using Kind = LayoutError::Kind;
  const std::string at = "cu_seqlens[" + std::to_string(error.index) + "]: expected ";
  const std::string bound = std::to_string(error.bound);
  const std::string got = ", got " + std::to_string(error.value);
  switch (error.kind) {
    case Kind::kNone:
      return;
    case Kind::kBegin:
      throw_value_error(at + "0 or more" + got);
    case Kind::kOrder:
      throw_value_error(at + "at least the value before it, " + bound + got);
    case Kind::kEnd:
      throw_value_error(at + "at most N = " + bound + got);
    case Kind::kPair:
      throw_index_error("pairs[" + std::to_string(error.index / 2) + ", " +
                        std::to_string(error.index % 2) +
                        "] is out of range: expected a sequence in [0, " + bound + ")" + got);
  }
}

inline void check_num_valid_tokens(int64_t found, int64_t R) {
  if (found <= R) return;
  throw_value_error("num_valid_tokens: expected at least " + std::to_string(found) +
                    ", the number of valid tokens in labels, got " + std::to_string(R));
}

}  // namespace simpo_ext::ops
