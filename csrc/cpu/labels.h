// The check of labels before a CPU kernel uses them as indices.
#pragma once

#include <cstdint>

#include "core/views.h"

namespace simpo_ext::cpu {

// The first label that is neither ignore_index nor in [0, V).
inline LabelError find_label_error(const Targets& targets, int64_t V) {
  for (int64_t b = 0; b < targets.B; ++b) {
    for (int64_t t = 0; t < targets.T; ++t) {
      const int64_t label = targets.at(b, t);
      if (label != targets.ignore_index && (label < 0 || label >= V)) {
        return {b, targets.label_position(t), label};
      }
    }
  }
  return {};
}

}  // namespace simpo_ext::cpu
