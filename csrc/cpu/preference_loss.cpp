// The preference loss on the CPU.
//
// Memory contract: the forward reads each valid token log-prob once and writes O(S + P) values. The
// backward reads labels and O(S + P) values, and writes [B, T]. Sums over tokens and over pairs are
// compensated, in double, in a fixed order.

#include <vector>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/preference.h"
#include "cpu/sequence_logps.h"

namespace simpo_ext::cpu {
namespace {

template <typename Scalar>
void forward(const PreferenceLossArgs& args, ParallelFor parallel_for) {
  const int64_t S = args.sequences.S, P = args.pairs.P;
  const Scalar* token_logps = static_cast<const Scalar*>(args.token_logps);
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const SequenceSum total = sum_valid_tokens(token_logps, args.token_strides, args.targets,
                                                 range_of(args.sequences, args.targets, s));
      args.sums[s] = total.sum;
      args.counts[s] = total.count;
    }
  };
  parallel_for(0, S, sequences_per_task(args.sequences, args.targets), do_sequences);

  const auto sum_of = [&](int64_t s) { return SequenceSum{args.sums[s], args.counts[s]}; };
  PreferenceTotals totals;
  for (int64_t p = 0; p < P; ++p) {
    const PairMembers members = members_of(args.pairs, p);
    const ScoredPair pair =
        score_pair(sum_of(members.chosen), sum_of(members.rejected), members.weight, args);
    write_pair<Scalar>(pair, p, P, args);
    totals.add(pair);
  }
  write_totals<Scalar>(totals, P, args);
}

template <typename Scalar>
void backward(const PreferenceLossBackwardArgs& args, ParallelFor parallel_for) {
  const int64_t S = args.sequences.S, P = args.pairs.P;
  Scalar* grad_token_logps = static_cast<Scalar*>(args.grad_token_logps);
  PairCounts totals;
  for (int64_t p = 0; p < P; ++p) {
    const PairMembers members = members_of(args.pairs, p);
    totals.add(args.counts[members.chosen], args.counts[members.rejected], args.reduction.empty);
  }
  // The gradient of each valid token of a sequence, from all pairs with that sequence.
  std::vector<double> gradients(static_cast<size_t>(S), 0.0);
  const auto gradient_of = [&](int64_t s) -> double& { return gradients[static_cast<size_t>(s)]; };
  for (int64_t p = 0; p < P; ++p) {
    const PairMembers members = members_of(args.pairs, p);
    const TokenGradients of_pair =
        pair_gradients<Scalar>(p, args.counts[members.chosen], args.counts[members.rejected],
                               members.weight, totals, args);
    gradient_of(members.chosen) += of_pair.chosen;
    gradient_of(members.rejected) += of_pair.rejected;
  }
  const auto do_sequences = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      spread_to_valid_tokens(gradient_of(s), args.targets,
                             range_of(args.sequences, args.targets, s), grad_token_logps);
    }
  };
  parallel_for(0, S, sequences_per_task(args.sequences, args.targets), do_sequences);
}

}  // namespace

LayoutError preference_loss(const PreferenceLossArgs& args, ParallelFor parallel_for) {
  const LayoutError error = find_layout_error(args.sequences, args.pairs, args.targets.T);
  if (error.found()) return error;
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args, parallel_for); });
  return {};
}

LayoutError preference_loss_backward(const PreferenceLossBackwardArgs& args,
                                     ParallelFor parallel_for) {
  const LayoutError error = find_layout_error(args.sequences, args.pairs, args.targets.T);
  if (error.found()) return error;
  dispatch_compute_dtype(
      args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args, parallel_for); });
  return {};
}

}  // namespace simpo_ext::cpu
