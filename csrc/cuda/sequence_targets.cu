// The targets of the flat layout on the GPU. The first kernel writes ignore_index everywhere. In
// the second, each sequence has a block, or several if it is long, that writes the targets of its
// scored positions. Reads the labels of all sequences once.

#include "core/kernels.h"
#include "cuda/sequence_sums.cuh"

namespace simpo_ext::cuda {
namespace {

__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    fill_targets_kernel(SequenceTargetsArgs args) {
  const int64_t t = row_of_block() * kSequenceThreads + threadIdx.x;
  if (t < args.labels.T) store(args.targets + t, args.labels.ignore_index);
}

__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    sequence_targets_kernel(SequenceTargetsArgs args) {
  const int64_t s = row_of_block();
  if (s >= args.sequences.S) return;
  const Targets& labels = args.labels;
  const TokenRange range = find_range(args.sequences, labels, s).range;
  const int64_t first = static_cast<int64_t>(blockIdx.z) * kSequenceThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.z) * kSequenceThreads;
  for (int64_t t = range.begin + first; t < range.end; t += step) {
    if (labels.label_position(t) >= range.end) continue;
    store(args.targets + t, load(labels.labels + labels.label_offset(0, t)));
  }
}

}  // namespace

int sequence_targets(const SequenceTargetsArgs& args, Stream stream) {
  if (args.labels.T == 0) return 0;
  const int64_t blocks = (args.labels.T + kSequenceThreads - 1) / kSequenceThreads;
  const int error =
      launch(fill_targets_kernel, grid_of_rows(blocks), dim3(kSequenceThreads), stream, args);
  if (error != 0 || args.sequences.S == 0) return error;
  return launch(sequence_targets_kernel,
                grid_of_rows(args.sequences.S, blocks_per_sequence(args.labels.T)),
                dim3(kSequenceThreads), stream, args);
}

}  // namespace simpo_ext::cuda
