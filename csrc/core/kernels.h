// The kernel API: raw pointers in, raw pointers out, no torch. B, T, V and P as in csrc/README.md;
// B = 2P in the preference loss, chosen rows first.
//
// "compute" is the dtype of everything but logits and their gradient: float for float32, bfloat16
// and float16 logits, double for float64. "contiguous" is said of outputs and of what a forward
// saved.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/loss_math.h"
#include "core/parallel.h"
#include "core/views.h"

namespace simpo_ext {

// Forward: logits [B, T, V] -> logps, max and sum_exp [B, T].
struct TokenLogpsArgs {
  DType dtype;
  int64_t V;
  const void* logits;  // [B, T, V] of dtype, stride 1 in V
  TokenStrides logits_strides;
  Targets targets;
  LogitTransform transform;
  void* logps;  // [B, T] contiguous, compute; 0 at masked positions
  // What the backward needs of a row: the largest transformed logit z, and sum(exp(z - max)). Kept
  // apart, they lose nothing to an offset of the logits, as max + log(sum_exp) would.
  void* max;        // [B, T] contiguous, compute; 0 at masked positions
  double* sum_exp;  // [B, T] contiguous; 0 at masked positions
};

// Backward: dlogits[b, t, :] = grad_logps[b, t] * (onehot(label) - softmax) * d transform.
struct TokenLogpsBackwardArgs {
  DType dtype;
  int64_t V;
  const void* logits;  // [B, T, V] of dtype, stride 1 in V
  TokenStrides logits_strides;
  Targets targets;
  LogitTransform transform;
  const void* grad_logps;  // [B, T], compute
  TokenStrides grad_strides;
  const void* max;        // [B, T] contiguous, compute
  const double* sum_exp;  // [B, T] contiguous
  void* dlogits;  // [B, T, V] of dtype, stride 1 in V; the very memory of logits, or apart from it
  TokenStrides dlogits_strides;
  bool dlogits_holds_zeros = false;  // if so, rows without a gradient need not be written
};

// Forward: token_logps [B, T] -> logps [B], the sum or mean over valid tokens, and their counts
// [B].
struct SequenceLogpsArgs {
  DType dtype;              // of token_logps: kFloat32 or kFloat64
  const void* token_logps;  // [B, T], compute
  TokenStrides token_strides;
  Targets targets;
  bool average;
  void* logps;      // [B] contiguous, compute
  int64_t* counts;  // [B] contiguous
};

struct SequenceLogpsBackwardArgs {
  DType dtype;
  Targets targets;
  bool average;
  const void* grad_logps;  // [B], compute
  int64_t grad_stride;
  const int64_t* counts;   // [B] contiguous
  void* grad_token_logps;  // [B, T] contiguous, compute
};

// What SimPOOutput.metrics() reads, in this order.
enum Metric : int {
  kRewardsChosen,
  kRewardsRejected,
  kRewardsAccuracies,
  kRewardsMargins,
  kLogpsChosen,
  kLogpsRejected,
  kNumPairs,
  kDroppedPairs,
  kNumTokens,
  kNumMetrics
};

// Forward: token_logps [2P, T] -> the loss and everything reported beside it.
struct PreferenceLossArgs {
  DType dtype;              // of token_logps: kFloat32 or kFloat64
  const void* token_logps;  // [2P, T], compute
  TokenStrides token_strides;
  Targets targets;
  bool average;
  PairLoss pair_loss;
  LossReduction reduction;
  double* sums;  // [2P] scratch
  void* loss;    // [] or, with Reduction::kNone, [P]; compute
  void* losses;  // [P], compute: the preference loss of each pair, without the SFT term; 0: dropped
  void* logps;   // [2P], compute; NaN for an empty sequence
  void* rewards;    // [2P], compute: beta * logps
  void* sft_loss;   // [] or [P], as loss; compute
  double* metrics;  // [kNumMetrics]
  void* slopes;     // [P], compute: d losses / d chosen logp; 0: dropped
  int64_t* counts;  // [2P]: valid tokens
};

// Backward: what each token's log-prob owes to the gradients of loss, losses, logps and sft_loss.
struct PreferenceLossBackwardArgs {
  DType dtype;
  Targets targets;
  bool average;
  LossReduction reduction;
  const void* slopes;        // [P] contiguous, compute, from the forward
  const int64_t* counts;     // [2P] contiguous, from the forward
  const void* grad_loss;     // [] or [P], compute; null: zero, as are the next three
  int64_t grad_loss_stride;  // 0 for []
  const void* grad_losses;   // [P], compute
  int64_t grad_losses_stride;
  const void* grad_logps;  // [2P], compute
  int64_t grad_logps_stride;
  const void* grad_sft_loss;  // [] or [P], compute
  int64_t grad_sft_loss_stride;
  void* grad_token_logps;  // [2P, T] contiguous, compute
};

namespace cpu {

// Both return the first invalid label, having written nothing if there is one.
LabelError token_logps(const TokenLogpsArgs& args, ParallelFor parallel_for);
LabelError token_logps_backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for);

void sequence_logps(const SequenceLogpsArgs& args, ParallelFor parallel_for);
void sequence_logps_backward(const SequenceLogpsBackwardArgs& args, ParallelFor parallel_for);
void preference_loss(const PreferenceLossArgs& args, ParallelFor parallel_for);
void preference_loss_backward(const PreferenceLossBackwardArgs& args, ParallelFor parallel_for);

// The instruction set the kernels run with, as in torch.backends.cpu.get_cpu_capability().
const char* capability();

}  // namespace cpu

namespace cuda {

// The kernels run on the current device, on a stream of it, and these return when they are
// enqueued: 0, or the cudaError_t of a launch that did not happen. Nothing waits for the device and
// nothing is allocated. A label out of range gives a row of NaN, without a read out of bounds.
using Stream = void*;  // cudaStream_t
int token_logps(const TokenLogpsArgs& args, Stream stream);
int token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream);

int sequence_logps(const SequenceLogpsArgs& args, Stream stream);
int sequence_logps_backward(const SequenceLogpsBackwardArgs& args, Stream stream);
int preference_loss(const PreferenceLossArgs& args, Stream stream);
int preference_loss_backward(const PreferenceLossBackwardArgs& args, Stream stream);

}  // namespace cuda
}  // namespace simpo_ext
