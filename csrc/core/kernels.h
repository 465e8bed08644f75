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

  // Logits may be those of a part of the vocabulary, the labels [first_label, first_label + V) of
  // num_labels. Then label_z is given, and what the part comes to is written there and to max and
  // sum_exp; logps, which are not known before the last part, are not written. A part of no columns
  // is one like any other. Labels are taken to be valid where continues says that a part came
  // before.
  int64_t first_label = 0;
  int64_t num_labels = V;
  bool continues = false;   // max, sum_exp and label_z hold what the parts before came to
  void* label_z = nullptr;  // [B, T] contiguous, compute: the label's z, NaN before its part

  // What is reported of a row beside, from the same pass: null, or both are given. Of a part of the
  // vocabulary, and of the parts before, mean_logit gets the sum of z instead, and entropy
  // sum(exp(z - max) (z - max)), as RowReport has them.
  double* mean_logit = nullptr;  // [B, T] contiguous: mean of z over the vocabulary
  double* entropy = nullptr;     // [B, T] contiguous: of softmax(z), in nats
  // Masked rows are read, too, for their mean_logit; otherwise that is 0, as is their entropy.
  bool all_positions = false;

  // CUDA: scratch for rows that several blocks share, where cuda::shared_segments asks for it and
  // there is neither a report nor a part of the vocabulary; otherwise null.
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
  void* dlogits;  // [B, T, V] of dtype, stride 1 in V; the very memory of logits, or apart from it
  TokenStrides dlogits_strides;
  bool dlogits_holds_zeros = false;  // if so, rows without a gradient need not be written

  // As in TokenLogpsArgs, for a part of the vocabulary. Where label_gradients are given, the part
  // that has a row's label writes its element there, unrounded, and 0 to dlogits, and labels are
  // taken to be valid.
  int64_t first_label = 0;
  int64_t num_labels = V;
  void* label_gradients = nullptr;  // [B, T] contiguous, compute
};

// The flat layout: labels [1, N] -> what each position is scored with, ignore_index where nothing:
// no label is taken across the end of a sequence. The targets of a batch in this layout come from
// here, and are without shift.
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
  void* grad_token_logps;  // [B, T] contiguous, compute; holding 0 in the flat layout
};

// ---- hidden states ---------------------------------------------------------------------------
//
// R rows stand for the valid tokens of a batch, in order: positions[i] = b * T + t. Rows for which
// there is no token have position -1, ignore_index for a label, and zeros for a hidden state.

// labels [B, T] -> positions and labels of R rows.
struct SelectTokensArgs {
  Targets targets;
  int64_t num_labels;  // V
  int64_t R;
  int64_t* positions;  // [R]
  int64_t* labels;     // [R]: what each token is scored with
  DType dtype;         // of the hidden states
  void* logps;  // [B, T] contiguous, compute; null, or: 0 at masked and NaN at valid positions
};

// rows[i] = source[position i]; zeros, if gradients are given and that of the row is 0, so that its
// hidden state has no part in a product even if it is not finite.
struct GatherRowsArgs {
  DType dtype;
  int64_t T, H, R;
  const int64_t* positions;  // [R]
  const void* source;        // [B, T, H] of dtype, stride 1 in H
  TokenStrides source_strides;
  void* rows;                       // [R, H] contiguous
  const void* gradients = nullptr;  // [R], compute
};

// logps[position i], once all parts of the vocabulary are in max, sum_exp and label_z.
struct WriteLogpsArgs {
  DType dtype;  // of the hidden states
  int64_t R;
  const int64_t* positions;  // [R]
  const void* max;           // [R], compute
  const double* sum_exp;     // [R]
  const void* label_z;       // [R], compute
  void* logps;               // [B, T] contiguous, compute

  // Null, or all are given: what TokenLogpsArgs has of a vocabulary in parts, and where it goes.
  int64_t num_labels = 0;             // V
  const double* sum_z = nullptr;      // [R]
  const double* sum_exp_z = nullptr;  // [R]
  double* mean_logit = nullptr;       // [B, T] contiguous
  double* entropy = nullptr;          // [B, T] contiguous
};

// dlogits[i, label i] = label_gradients[i], in the part of the vocabulary that has the label.
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

// sum[i] += partial[i], or = where it is the first.
struct AddPartialArgs {
  DType dtype;
  int64_t count;
  const void* partial;  // [count] of dtype
  void* sum;            // [count], compute
  bool is_first;
};

// dhidden[position i] = sum[i] + partial[i] + label_gradients[i] * weight[label i], rounded once.
struct HiddenGradientArgs {
  DType dtype;
  int64_t T, H, R;
  int64_t num_labels;           // V
  const int64_t* positions;     // [R]
  const int64_t* labels;        // [R]; out of range on a GPU: a row of NaN
  const void* label_gradients;  // [R], compute
  const void* weight;           // [V, H] of dtype
  int64_t weight_stride_v, weight_stride_h;
  const void* partial;  // [R, H] contiguous, of dtype
  const void* sum;      // [R, H] contiguous, compute; null: nothing to add
  void* dhidden;        // [B, T, H] contiguous, of dtype
};

// ---- a vocabulary in shards ------------------------------------------------------------------

// What K shards, in order, say of each row: its maximum z, its sum(exp(z - maximum)), and its
// label's z, NaN where that is on another shard -> logps, max and sum_exp of the whole vocabulary.
// A label that is on no shard or, as where ranks disagree on labels, on two: NaN.
struct MergeShardsArgs {
  DType dtype;      // of logps: kFloat32 or kFloat64
  Targets targets;  // rows as b * T + t
  int64_t K;
  const double* shards;      // [K, 3, B, T] contiguous
  const int64_t* positions;  // [B * T]: where each row's logp goes; null: in order
  void* logps;               // compute; 0 at masked rows, if it has no positions
  void* max;                 // [B, T] contiguous, compute; 0 at masked rows
  double* sum_exp;           // [B, T] contiguous; 0 at masked rows
};

// sum[i] += label_gradients[i] * weight[label i - first_label], on the shard that has the label.
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

// to[position i] = rows[i], rounded.
struct ScatterRowsArgs {
  DType dtype;
  int64_t H, R;
  const int64_t* positions;  // [R]
  const void* rows;          // [R, H] contiguous, compute
  void* to;                  // [B, T, H] contiguous, of dtype
};

// ---- pairs -----------------------------------------------------------------------------------

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

// Forward: token_logps [B, T] -> the loss and everything reported beside it. What is given as [2P]
// is of the pairs' chosen sequences and then of their rejected ones.
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
                   // 0: dropped
  void* logps;     // [2P], compute; NaN for an empty sequence
  void* rewards;   // [2P], compute: beta * shaped_logp
  void* sft_loss;  // [] or [P], as loss; compute
  double* metrics;  // [kNumMetrics]
  void* slopes;     // [2P], compute: d losses / d logps; 0: dropped
  int64_t* counts;  // [S]: valid tokens
};

// Backward: what each token's log-prob owes to the gradients of loss, losses, logps and sft_loss.
struct PreferenceLossBackwardArgs {
  DType dtype;
  Targets targets;
  Sequences sequences;
  Pairs pairs;
  bool average;
  LossReduction reduction;
  const void* slopes;        // [2P] contiguous, compute, from the forward
  const int64_t* counts;     // [S] contiguous, from the forward
  const void* grad_loss;     // [] or [P], compute; null: zero, as are the next three
  int64_t grad_loss_stride;  // 0 for []
  const void* grad_losses;   // [P], compute
  int64_t grad_losses_stride;
  const void* grad_logps;  // [2P], compute
  int64_t grad_logps_stride;
  const void* grad_sft_loss;  // [] or [P], compute
  int64_t grad_sft_loss_stride;
  void* grad_token_logps;  // [B, T] contiguous, compute; holding 0 in the flat layout
};

namespace cpu {

// Both return the first invalid label, having written nothing if there is one.
LabelError token_logps(const TokenLogpsArgs& args, ParallelFor parallel_for);
LabelError token_logps_backward(const TokenLogpsBackwardArgs& args, ParallelFor parallel_for);

// How many valid tokens there are, which may be more than R.
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

// All return what is wrong with cu_seqlens or pairs, having written nothing if anything is.
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

// The instruction set the kernels run with, as in torch.backends.cpu.get_cpu_capability().
const char* capability();

}  // namespace cpu

namespace cuda {

// The kernels run on the current device, on a stream of it, and these return when they are
// enqueued: 0, or the cudaError_t of a launch that did not happen. Nothing waits for the device and
// nothing is allocated. A label out of range gives a row of NaN, and so does a sequence that
// cu_seqlens put out of range, and a pair of sequences that are not there, without a read out of
// bounds.
using Stream = void*;  // cudaStream_t
int token_logps(const TokenLogpsArgs& args, Stream stream);
// Into how many segments token_logps cuts a row so that several blocks share it; 0: no block
// shares.
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
