// Sequence log-probabilities on the CPU.
//
// Memory contract: the forward reads each valid token once and writes 12 bytes a sequence, or 16
// for float64. The backward writes [B, T]. Sums are compensated, in double.

#include "cpu/sequence_logps.h"

#include "core/dispatch.h"
#include "core/kernels.h"

namespace simpo_ext::cpu {
namespace {

template <typename Scalar>
void forward(const SequenceLogpsArgs& args, ParallelFor parallel_for) {
  const Scalar* token_logps = static_cast<const Scalar*>(args.token_logps);
  Scalar* logps = static_cast<Scalar*>(args.logps);
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const SequenceSum total = sum_valid_tokens(token_logps, args.token_strides, args.targets,
                                                 range_of(args.sequences, args.targets, s));
      logps[s] = static_cast<Scalar>(sequence_logp(total.sum, total.count, args.average));
      args.counts[s] = total.count;
    }
  };
  parallel_for(0, args.sequences.S, sequences_per_task(args.sequences, args.targets), do_sequences);
}

template <typename Scalar>
void backward(const SequenceLogpsBackwardArgs& args, ParallelFor parallel_for) {
  const Scalar* grad_logps = static_cast<const Scalar*>(args.grad_logps);
  Scalar* grad_token_logps = static_cast<Scalar*>(args.grad_token_logps);
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const double gradient = static_cast<double>(grad_logps[s * args.grad_stride]) *
                              sequence_logp_slope<double>(args.counts[s], args.average);
      spread_to_valid_tokens(gradient, args.targets, range_of(args.sequences, args.targets, s),
                             grad_token_logps);
    }
  };
  parallel_for(0, args.sequences.S, sequences_per_task(args.sequences, args.targets), do_sequences);
}

}  // namespace

LayoutError sequence_logps(const SequenceLogpsArgs& args, ParallelFor parallel_for) {
  const LayoutError error = find_sequence_error(args.sequences, args.targets.T);
  if (error.found()) return error;
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, parallel_for); });
  return {};
}

LayoutError sequence_logps_backward(const SequenceLogpsBackwardArgs& args,
                                    ParallelFor parallel_for) {
  const LayoutError error = find_sequence_error(args.sequences, args.targets.T);
  if (error.found()) return error;
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args, parallel_for); });
  return {};
}

}  // namespace simpo_ext::cpu
