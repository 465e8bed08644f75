// The targets of the flat layout on the CPU: reads the labels of all sequences once and writes
// [1, N].

#include <algorithm>

#include "core/kernels.h"
#include "cpu/sequences.h"

namespace simpo_ext::cpu {

TargetError sequence_targets(const SequenceTargetsArgs& args) {
  const Targets& labels = args.labels;
  const Sequences& sequences = args.sequences;
  const LayoutError layout = find_sequence_error(sequences, labels.T);
  if (layout.found()) return {layout, {}};
  std::fill_n(args.targets, labels.T, labels.ignore_index);
  for (int64_t s = 0; s < sequences.S; ++s) {
    const TokenRange range = range_of(sequences, labels, s);
    for (int64_t t = range.begin; t < range.end; ++t) {
      if (labels.label_position(t) >= range.end) continue;
      const int64_t label = labels.at(0, t);
      if (label != labels.ignore_index && (label < 0 || label >= args.num_labels)) {
        return {{}, {0, labels.label_position(t), label}};
      }
      args.targets[t] = label;
    }
  }
  return {};
}

}  // namespace simpo_ext::cpu
