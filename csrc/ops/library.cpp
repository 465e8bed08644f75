// The schemas of all ops. An op that overwrites a tensor has Tensor(a!) in its schema and a
// trailing underscore in its name.
//
// Enums are ints, with the values of core/loss_math.h, because the stable ABI cannot pass strings
// safely. A softcap of 0 means that there is none.

#include "ops/registration.h"

namespace simpo_ext::ops {

void define_ops(Library& m) {
  m.def(
      "token_logps(Tensor logits, Tensor labels, int ignore_index, bool shift, float "
      "logit_scale, float softcap) -> (Tensor logps, Tensor max, Tensor sum_exp)");
  m.def(
      "token_logps_report(Tensor logits, Tensor labels, int ignore_index, bool shift, float "
      "logit_scale, float softcap, bool all_positions) -> (Tensor logps, Tensor max, Tensor "
      "sum_exp, Tensor mean_logit, Tensor entropy)");
  m.def(
      "token_logps_backward(Tensor grad_logps, Tensor logits, Tensor labels, Tensor max, "
      "Tensor sum_exp, int ignore_index, bool shift, float logit_scale, float softcap) -> "
      "Tensor");
  m.def(
      "token_logps_backward_(Tensor grad_logps, Tensor(a!) logits, Tensor labels, Tensor "
      "max, Tensor sum_exp, int ignore_index, bool shift, float logit_scale, float softcap) "
      "-> ()");
  m.def(
      "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int "
      "ignore_index, bool shift, float logit_scale, float softcap, int logits_budget_bytes, "
      "SymInt num_valid_tokens) -> (Tensor logps, Tensor max, Tensor sum_exp, Tensor "
      "kept_logits)");
  m.def(
      "linear_token_logps_report(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int "
      "ignore_index, bool shift, float logit_scale, float softcap, int logits_budget_bytes, "
      "SymInt num_valid_tokens) -> (Tensor logps, Tensor max, Tensor sum_exp, Tensor "
      "kept_logits, Tensor mean_logit, Tensor entropy)");
  m.def(
      "linear_token_logps_backward(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor? "
      "bias, Tensor labels, Tensor max, Tensor sum_exp, Tensor kept_logits, int ignore_index, "
      "bool shift, float logit_scale, float softcap, bool needs_hidden, bool needs_weight, bool "
      "needs_bias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "token_logps_shard(Tensor logits, Tensor labels, int first_label, int num_labels, int "
      "ignore_index, bool shift, float logit_scale, float softcap) -> Tensor");
  m.def(
      "token_logps_merge(Tensor shards, Tensor labels, int ignore_index, bool shift, bool float64) "
      "-> (Tensor logps, Tensor max, Tensor sum_exp)");
  m.def(
      "token_logps_shard_backward(Tensor grad_logps, Tensor logits, Tensor labels, Tensor max, "
      "Tensor sum_exp, int first_label, int num_labels, int ignore_index, bool shift, float "
      "logit_scale, float softcap) -> Tensor");
  m.def(
      "token_logps_shard_backward_(Tensor grad_logps, Tensor(a!) logits, Tensor labels, Tensor "
      "max, Tensor sum_exp, int first_label, int num_labels, int ignore_index, bool shift, float "
      "logit_scale, float softcap) -> ()");
  m.def(
      "linear_token_logps_shard(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int "
      "first_label, int num_labels, int ignore_index, bool shift, float logit_scale, float "
      "softcap, int logits_budget_bytes, SymInt num_valid_tokens) -> (Tensor stats, Tensor "
      "kept_logits)");
  m.def(
      "linear_token_logps_merge(Tensor shards, Tensor labels, int ignore_index, bool shift, bool "
      "float64) -> (Tensor logps, Tensor max, Tensor sum_exp)");
  m.def(
      "linear_token_logps_shard_backward(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor? "
      "bias, Tensor labels, Tensor max, Tensor sum_exp, Tensor kept_logits, int first_label, int "
      "num_labels, int ignore_index, bool shift, float logit_scale, float softcap, bool "
      "needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor dhidden_rows, Tensor dweight, "
      "Tensor dbias)");
  m.def(
      "linear_token_logps_dhidden(Tensor dhidden_rows, Tensor hidden, Tensor labels, int "
      "ignore_index, bool shift) -> Tensor");
  m.def(
      "sequence_targets(Tensor labels, Tensor cu_seqlens, SymInt num_labels, int ignore_index, "
      "bool shift) -> Tensor");
  m.def(
      "sequence_logps(Tensor token_logps, Tensor labels, Tensor? cu_seqlens, int ignore_index, "
      "bool shift, bool average_log_prob) -> (Tensor logps, Tensor counts)");
  m.def(
      "sequence_logps_backward(Tensor grad_logps, Tensor labels, Tensor? cu_seqlens, Tensor "
      "counts, int ignore_index, bool shift, bool average_log_prob) -> Tensor");
  m.def(
      "preference_loss(Tensor token_logps, Tensor labels, Tensor? cu_seqlens, Tensor? pairs, "
      "Tensor? pair_weight, int ignore_index, bool shift, bool average_log_prob, float beta, "
      "float gamma_beta_ratio, int loss_type, float label_smoothing, float alpha, float "
      "sft_weight, int sft_reduction, int reduction, int empty) -> (Tensor loss, Tensor losses, "
      "Tensor logps, Tensor rewards, Tensor sft_loss, Tensor "
      "metrics, Tensor slopes, Tensor counts)");
  m.def(
      "preference_loss_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_logps, "
      "Tensor? grad_sft_loss, Tensor labels, Tensor? cu_seqlens, Tensor? pairs, Tensor? "
      "pair_weight, Tensor slopes, Tensor counts, int ignore_index, bool shift, bool "
      "average_log_prob, float sft_weight, int "
      "sft_reduction, int reduction, int empty) -> Tensor");
}

}  // namespace simpo_ext::ops
