// The preference loss on the CPU.
//
// Memory contract: the forward reads each valid token log-prob once and writes O(P); the backward
// reads labels and O(P), and writes [2P, T]. Sums over tokens and over pairs are compensated, in
// double, in a fixed order.

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/preference.h"
#include "cpu/sequence_logps.h"

namespace simpo_ext::cpu {
namespace {

template <typename Scalar>
void forward(const PreferenceLossArgs& args, ParallelFor parallel_for) {
  const int64_t P = args.targets.B / 2;
  const Scalar* token_logps = static_cast<const Scalar*>(args.token_logps);
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const SequenceSum total = sum_valid_tokens(token_logps, args.token_strides, args.targets, b);
      args.sums[b] = total.sum;
      args.counts[b] = total.count;
    }
  };
  parallel_for(0, 2 * P, sequences_per_task(args.targets.T), do_sequences);

  PreferenceTotals totals;
  for (int64_t p = 0; p < P; ++p) {
    const ScoredPair pair =
        score_pair({args.sums[p], args.counts[p]}, {args.sums[P + p], args.counts[P + p]}, args);
    write_pair<Scalar>(pair, p, P, args);
    totals.add(pair);
  }
  write_totals<Scalar>(totals, P, args);
}

template <typename Scalar>
void backward(const PreferenceLossBackwardArgs& args, ParallelFor parallel_for) {
  const int64_t P = args.targets.B / 2;
  Scalar* grad_token_logps = static_cast<Scalar*>(args.grad_token_logps);
  PairCounts totals;
  for (int64_t p = 0; p < P; ++p) {
    totals.add(args.counts[p], args.counts[P + p], args.reduction.empty);
  }
  const auto do_pairs = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const TokenGradients gradients = pair_gradients<Scalar>(p, P, totals, args);
      spread_to_valid_tokens(gradients.chosen, args.targets, p, grad_token_logps);
      spread_to_valid_tokens(gradients.rejected, args.targets, P + p, grad_token_logps);
    }
  };
  parallel_for(0, P, sequences_per_task(2 * args.targets.T), do_pairs);
}

}  // namespace

void preference_loss(const PreferenceLossArgs& args, ParallelFor parallel_for) {
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, parallel_for); });
}

void preference_loss_backward(const PreferenceLossBackwardArgs& args, ParallelFor parallel_for) {
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args, parallel_for); });
}

}  // namespace simpo_ext::cpu
