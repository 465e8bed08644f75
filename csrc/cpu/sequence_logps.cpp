// Sequence log-probabilities on the CPU. Reads each valid token once, writes 8 + 4 (or 8) bytes a
// sequence; the backward writes [B, T]. Accumulates compensated in double.

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
    for (int64_t b = begin; b < end; ++b) {
      const SequenceSum total = sum_valid_tokens(token_logps, args.token_strides, args.targets, b);
      logps[b] = static_cast<Scalar>(sequence_logp(total.sum, total.count, args.average));
      args.counts[b] = total.count;
    }
  };
  parallel_for(0, args.targets.B, sequences_per_task(args.targets.T), do_sequences);
}

template <typename Scalar>
void backward(const SequenceLogpsBackwardArgs& args, ParallelFor parallel_for) {
  const Scalar* grad_logps = static_cast<const Scalar*>(args.grad_logps);
  Scalar* grad_token_logps = static_cast<Scalar*>(args.grad_token_logps);
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double weight = static_cast<double>(grad_logps[b * args.grad_stride]) *
                            sequence_logp_slope<double>(args.counts[b], args.average);
      spread_to_valid_tokens(weight, args.targets, b, grad_token_logps);
    }
  };
  parallel_for(0, args.targets.B, sequences_per_task(args.targets.T), do_sequences);
}

}  // namespace

void sequence_logps(const SequenceLogpsArgs& args, ParallelFor parallel_for) {
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, parallel_for); });
}

void sequence_logps_backward(const SequenceLogpsBackwardArgs& args, ParallelFor parallel_for) {
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args, parallel_for); });
}

}  // namespace simpo_ext::cpu
