// The kernel API: raw pointers in, raw pointers out, no torch. B, T, V and P as in csrc/README.md;
// B = 2P in the preference loss, chosen rows first.
//
// "compute" is the dtype of all tensors except logits, hidden states, weights and their gradients:
// float for float32, bfloat16 and float16 logits, double for float64. Outputs and tensors saved by
// a forward are contiguous. Inputs are contiguous only where their comment says so.
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
  // For the backward: the largest transformed logit z of a row, and sum(exp(z - max)). One value,
  // max + log(sum_exp), would lose digits if the logits have a large offset.
  void* max;        // [B, T] contiguous, compute; 0 at masked positions
  double* sum_exp;  // [B, T] contiguous; 0 at masked positions

  // The logits may belong to a part of the vocabulary: the labels [first_label, first_label + V) of
  // num_labels. Then label_z is given, and the kernel writes the sums of the part to max, sum_exp
  // and label_z. It does not write logps, which only the last part completes. A part may have no
  // columns. With continues, an earlier part has checked the labels.
  int64_t first_label = 0;
  int64_t num_labels = V;
  bool continues = false;   // max, sum_exp and label_z hold the sums of the parts before
  void* label_z = nullptr;  // [B, T] contiguous, compute: the label's z, NaN before its part

  // The report of a row, from the same pass: both null, or both given. For a part of the
  // vocabulary, they hold the sums of RowReport instead, over this part and those before:
  // mean_logit the sum of z, and entropy sum(exp(z - max) (z - max)).
  double* mean_logit = nullptr;  // [B, T] contiguous: mean of z over the vocabulary
  double* entropy = nullptr;     // [B, T] contiguous: of softmax(z), in nats
  // True: also read masked rows, for their mean_logit. False: it is 0. Their entropy is always 0.
  bool all_positions = false;

  // CUDA: scratch for rows that several blocks share, needed if cuda::shared_segments is not 0.
  // Null with a report or a part of the vocabulary.
  double* segments = nullptr;  // [shared_segments, 3, B * T] contiguous
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
  void* dlogits;  // [B, T, V] of dtype, stride 1 in V; equal to logits, or no overlap with it
  TokenStrides dlogits_strides;
  bool dlogits_holds_zeros = false;  // then rows without a gradient need not be written

  // A part of the vocabulary, as in TokenLogpsArgs. If label_gradients are given, the part that has
  // a row's label writes the label's element there, unrounded, and 0 to dlogits. The labels are
  // then not checked.
  int64_t first_label = 0;
  int64_t num_labels = V;
  void* label_gradients = nullptr;  // [B, T] contiguous, compute
};

// The flat layout: labels [1, N] -> the label that scores each position, or ignore_index. The shift
// does not cross the end of a sequence. The result needs no further shift.
struct SequenceTargetsArgs {
  Targets labels;
  int64_t num_labels;  // V
  Sequences sequences;
  int64_t* targets;  // [1, N] contiguous
};

// Forward: token_logps [B, T] -> logps [S], the sum or mean over valid tokens, and their counts
// [S].
struct SequenceLogpsArgs {
  DType dtype;              // of token_logps: kFloat32 or kFloat64
  const void* token_logps;  // [B, T], compute
  TokenStrides token_strides;
  Targets targets;
  Sequences sequences;
  bool average;
  void* logps;      // [S] contiguous, compute
  int64_t* counts;  // [S] contiguous
};

struct SequenceLogpsBackwardArgs {
  DType dtype;
  Targets targets;
  Sequences sequences;
  bool average;
  const void* grad_logps;  // [S], compute
  int64_t grad_stride;
  const int64_t* counts;   // [S] contiguous
  void* grad_token_logps;  // [B, T] contiguous, compute; in the flat layout, it must hold zeros
};

// ---- hidden states ---------------------------------------------------------------------------
//
// The valid tokens of a batch become R rows, in order: positions[i] = b * T + t. A row without a
// token has position -1, the label ignore_index and a hidden state of zeros.

// labels [B, T] -> positions and labels of R rows.
struct SelectTokensArgs {
  Targets targets;
  int64_t num_labels;  // V
  int64_t R;
  int64_t* positions;  // [R]
  int64_t* labels;     // [R]: the label that scores each token
  DType dtype;         // of the hidden states
  void* logps;  // [B, T] contiguous, compute, or null; 0 at masked and NaN at valid positions
};

// rows[i] = source[positions[i]]. If gradients are given, a row whose gradient is 0 becomes zeros,
// so that it adds nothing to a product even if its hidden state is not finite.
struct GatherRowsArgs {
  DType dtype;
  int64_t T, H, R;
  const int64_t* positions;  // [R]
  const void* source;        // [B, T, H] of dtype, stride 1 in H
  TokenStrides source_strides;
  void* rows;                       // [R, H] contiguous
  const void* gradients = nullptr;  // [R], compute
};

// logps[positions[i]] from max, sum_exp and label_z over all parts of the vocabulary.
struct WriteLogpsArgs {
  DType dtype;  // of the hidden states
  int64_t R;
  const int64_t* positions;  // [R]
  const void* max;           // [R], compute
  const double* sum_exp;     // [R]
  const void* label_z;       // [R], compute
  void* logps;               // [B, T] contiguous, compute

  // For a report: the sums over all parts, and the results. All null, or all given.
  int64_t num_labels = 0;             // V
  const double* sum_z = nullptr;      // [R]
  const double* sum_exp_z = nullptr;  // [R]
  double* mean_logit = nullptr;       // [B, T] contiguous
  double* entropy = nullptr;          // [B, T] contiguous
};

// dlogits[i, labels[i] - first_label] = label_gradients[i], in the part that has the label.
struct PutLabelGradientsArgs {
  DType dtype;
  int64_t R, V;
  int64_t first_label;
  int64_t ignore_index;
  const int64_t* labels;        // [R]
  const void* label_gradients;  // [R], compute
  void* dlogits;                // [R, V] of dtype, stride 1 in V
  int64_t dlogits_stride;
};

// sum[i] += partial[i], or sum[i] = partial[i] for the first.
struct AddPartialArgs {
  DType dtype;
  int64_t count;
  const void* partial;  // [count] of dtype
  void* sum;            // [count], compute
  bool is_first;
};

// dhidden[positions[i]] = sum[i] + partial[i] + label_gradients[i] * weight[labels[i]], rounded
// once.
struct HiddenGradientArgs {
  DType dtype;
  int64_t T, H, R;
  int64_t num_labels;           // V
  const int64_t* positions;     // [R]
  const int64_t* labels;        // [R]; on a GPU, a label out of range gives a row of NaN
  const void* label_gradients;  // [R], compute
  const void* weight;           // [V, H] of dtype
  int64_t weight_stride_v, weight_stride_h;
  const void* partial;  // [R, H] contiguous, of dtype
  const void* sum;      // [R, H] contiguous, compute; null: 0
  void* dhidden;        // [B, T, H] contiguous, of dtype
};

// ---- a sharded vocabulary --------------------------------------------------------------------

// Merges K shards, in order, into logps, max and sum_exp over the whole vocabulary. For each row, a
// shard has its largest z, its sum(exp(z - largest)), and the label's z, or NaN if the label is on
// another shard. The logp is NaN if the label is on no shard, or on two because ranks have
// different labels.
struct MergeShardsArgs {
  DType dtype;      // of logps: kFloat32 or kFloat64
  Targets targets;  // rows as b * T + t
  int64_t K;
  const double* shards;      // [K, 3, B, T] contiguous
  const int64_t* positions;  // [B * T]: the index of each row's logp; null: that of the row
  void* logps;               // compute; without positions, 0 at masked rows
  void* max;                 // [B, T] contiguous, compute; 0 at masked rows
  double* sum_exp;           // [B, T] contiguous; 0 at masked rows
};

// sum[i] += label_gradients[i] * weight[labels[i] - first_label], on the shard that has the label.
struct AddLabelSharesArgs {
  DType dtype;
  int64_t H, R;
  int64_t first_label;
  int64_t V;  // labels of the shard
  int64_t ignore_index;
  const int64_t* labels;        // [R]
  const void* label_gradients;  // [R], compute
  const void* weight;           // [V, H] of dtype
  int64_t weight_stride_v, weight_stride_h;
  void* sum;  // [R, H] contiguous, compute
};

// to[positions[i]] = rows[i], rounded.
struct ScatterRowsArgs {
  DType dtype;
  int64_t H, R;
  const int64_t* positions;  // [R]
  const void* rows;          // [R, H] contiguous, compute
  void* to;                  // [B, T, H] contiguous, of dtype
};

// ---- pairs -----------------------------------------------------------------------------------

// The order of metrics.
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

// Forward: token_logps [B, T] -> the loss, the values reported with it, and the slopes for the
// backward. Tensors [2P] have the chosen sequences of all pairs first, then the rejected ones.
struct PreferenceLossArgs {
  DType dtype;              // of token_logps: kFloat32 or kFloat64
  const void* token_logps;  // [B, T], compute
  TokenStrides token_strides;
  Targets targets;
  Sequences sequences;
  Pairs pairs;
  bool average;
  PairLoss pair_loss;
  LossReduction reduction;
  double* sums;    // [S] scratch
  void* loss;      // [] or, with Reduction::kNone, [P]; compute
  void* losses;    // [P], compute: weight times preference loss of each pair, without the SFT term;
                   // 0 if dropped
  void* logps;     // [2P], compute; NaN for an empty sequence
  void* rewards;   // [2P], compute: beta * shaped_logp
  void* sft_loss;  // the same shape as loss; compute
  double* metrics;  // [kNumMetrics]
  void* slopes;     // [2P], compute: d losses / d logps; 0 if dropped
  int64_t* counts;  // [S]: valid tokens
};

// Backward: the gradients of loss, losses, logps and sft_loss -> the gradient of each token's
// log-prob.
struct PreferenceLossBackwardArgs {
  DType dtype;
  Targets targets;
  Sequences sequences;
  Pairs pairs;
  bool average;
  LossReduction reduction;
  const void* slopes;        // [2P] contiguous, compute, from the forward
  const int64_t* counts;     // [S] contiguous, from the forward
  const void* grad_loss;     // [] or [P], compute; this and the next three: null for zero
  int64_t grad_loss_stride;  // 0 for []
  const void* grad_losses;   // [P], compute
  int64_t grad_losses_stride;
  const void* grad_logps;  // [2P], compute
  int64_t grad_logps_stride;
  const void* grad_sft_loss;  // [] or [P], compute
  int64_t grad_sft_loss_stride;
  void* grad_token_logps;  // [B, T] contiguous, compute; in the flat layout, it must hold zeros
};

namespace cpu {

// Both return the first invalid label, if any, and then write nothing.
LabelError token_logps(const TokenLogpsArgs& args, ParallelFor parallel_for);
LabelError token_logps_backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for);

// count: the number of valid tokens, which may be more than R.
struct Selection {
  LabelError error;
  int64_t count;
};
Selection select_tokens(const SelectTokensArgs& args);
void gather_rows(const GatherRowsArgs& args, ParallelFor parallel_for);
void write_logps(const WriteLogpsArgs& args);
void put_label_gradients(const PutLabelGradientsArgs& args);
void add_partial(const AddPartialArgs& args, ParallelFor parallel_for);
void hidden_gradient(const HiddenGradientArgs& args, ParallelFor parallel_for);

void merge_shards(const MergeShardsArgs& args);
void add_label_shares(const AddLabelSharesArgs& args, ParallelFor parallel_for);
void scatter_rows(const ScatterRowsArgs& args, ParallelFor parallel_for);

// These return the first error of cu_seqlens or pairs, if any, and then write nothing.
struct TargetError {
  LayoutError layout;
  LabelError label;
};
TargetError sequence_targets(const SequenceTargetsArgs& args);
LayoutError sequence_logps(const SequenceLogpsArgs& args, ParallelFor parallel_for);
LayoutError sequence_logps_backward(const SequenceLogpsBackwardArgs& args,
                                    ParallelFor parallel_for);
LayoutError preference_loss(const PreferenceLossArgs& args, ParallelFor parallel_for);
LayoutError preference_loss_backward(const PreferenceLossBackwardArgs& args,
                                     ParallelFor parallel_for);

// The instruction set of the kernels, as in torch.backends.cpu.get_cpu_capability().
const char* capability();

}  // namespace cpu

namespace cuda {

// These functions enqueue kernels on a stream of the current device and return 0, or the
// cudaError_t of a failed launch. They do not wait for the device and do not allocate. A label out
// of range gives a row of NaN. A sequence with wrong cu_seqlens, or a pair with a sequence that
// does not exist, gives NaN. None of these causes a read out of bounds.
using Stream = void*;  // cudaStream_t
int token_logps(const TokenLogpsArgs& args, Stream stream);
// The number of segments into which token_logps cuts a row so that several blocks share it; 0 if
// each row has one block.
int64_t shared_segments(DType dtype, int64_t N, int64_t V);
int token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream);

int select_tokens(const SelectTokensArgs& args, Stream stream);
int gather_rows(const GatherRowsArgs& args, Stream stream);
int write_logps(const WriteLogpsArgs& args, Stream stream);
int put_label_gradients(const PutLabelGradientsArgs& args, Stream stream);
int add_partial(const AddPartialArgs& args, Stream stream);
int hidden_gradient(const HiddenGradientArgs& args, Stream stream);

int merge_shards(const MergeShardsArgs& args, Stream stream);
int add_label_shares(const AddLabelSharesArgs& args, Stream stream);
int scatter_rows(const ScatterRowsArgs& args, Stream stream);

int sequence_targets(const SequenceTargetsArgs& args, Stream stream);
int sequence_logps(const SequenceLogpsArgs& args, Stream stream);
int sequence_logps_backward(const SequenceLogpsBackwardArgs& args, Stream stream);
int preference_loss(const PreferenceLossArgs& args, Stream stream);
int preference_loss_backward(const PreferenceLossBackwardArgs& args, Stream stream);

}  // namespace cuda
}  // namespace simpo_ext
