// Sequence log-probabilities on the GPU.
//
// Memory contract: the forward reads each valid token once and writes 12 bytes a sequence, or 16
// for float64. The backward writes [B, T].

#include "core/dispatch.h"
#include "core/kernels.h"
#include "cuda/sequence_sums.cuh"

namespace simpo_ext::cuda {
namespace {

template <typename Scalar>
__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    sequence_logps_kernel(SequenceLogpsArgs args) {
  const int64_t s = row_of_block();
  if (s >= args.sequences.S) return;
  const SequenceSum total = sum_valid_tokens<Scalar, kSequenceThreads>(
      static_cast<const Scalar*>(args.token_logps), args.token_strides, args.targets,
      find_range(args.sequences, args.targets, s));
  if (threadIdx.x == 0) {
    store(static_cast<Scalar*>(args.logps) + s,
          static_cast<Scalar>(sequence_logp(total.sum, total.count, args.average)));
    store(args.counts + s, total.count);
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kSequenceThreads, kSequenceBlocksPerSM)
    sequence_logps_backward_kernel(SequenceLogpsBackwardArgs args) {
  const int64_t s = row_of_block();
  if (s >= args.sequences.S) return;
  const Scalar grad =
      load_uniform(static_cast<const Scalar*>(args.grad_logps) + s * args.grad_stride);
  const double slope = sequence_logp_slope<double>(load_uniform(args.counts + s), args.average);
  spread_to_valid_tokens(static_cast<double>(grad) * slope, args.targets,
                         find_range(args.sequences, args.targets, s).range,
                         static_cast<Scalar*>(args.grad_token_logps));
}

}  // namespace

int sequence_logps(const SequenceLogpsArgs& args, Stream stream) {
  if (args.sequences.S == 0) return 0;
  int error = 0;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    error = launch(sequence_logps_kernel<typename decltype(tag)::type>,
                   grid_of_rows(args.sequences.S), dim3(kSequenceThreads), stream, args);
  });
  return error;
}

int sequence_logps_backward(const SequenceLogpsBackwardArgs& args, Stream stream) {
  if (args.sequences.S * args.targets.T == 0) return 0;
  int error = 0;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    error = launch(sequence_logps_backward_kernel<typename decltype(tag)::type>,
                   grid_of_rows(args.sequences.S, blocks_per_sequence(args.targets.T)),
                   dim3(kSequenceThreads), stream, args);
  });
  return error;
}

}  // namespace simpo_ext::cuda
