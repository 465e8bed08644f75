// Log-probabilities for a vocabulary that is sharded over ranks, for C++ programs that use
// libtorch. Formulas, defaults, edge cases and the calls of collectives are those of the Python
// functions of the same name. The program provides the collectives.
//
//   simpo_ext::VocabShard shard{first_label, vocab_size, all_gather, all_reduce};
//   at::Tensor logps = simpo_ext::vocab_parallel_token_logps(logits, labels, shard);
//
// The errors are those of simpo_ext.h.
#pragma once

#include <simpo_ext/simpo_ext.h>
#include <torch/custom_class.h>

#include <functional>

namespace simpo_ext {

// The labels whose logits this rank has, and the collectives over all ranks of the vocabulary.
// Labels, options and shapes other than V_k must be the same on every rank. Every rank calls the
// collectives in the same order.
struct VocabShard {
  int64_t first_label;  // the label of this rank's first column
  int64_t vocab_size;   // the number of labels of all ranks together
  // [...] -> [K, ...]: the tensors of all K ranks, in the same order on every rank.
  std::function<at::Tensor(const at::Tensor&)> all_gather;
  // The sum of the tensors of all ranks, with the same bits on every rank. May overwrite its
  // argument.
  std::function<at::Tensor(const at::Tensor&)> all_reduce;
};

namespace detail {

// Lets a node of the autograd graph keep a shard until its backward.
struct KeptVocabShard : torch::CustomClassHolder {
  explicit KeptVocabShard(VocabShard kept) : shard(std::move(kept)) {}
  VocabShard shard;
};

inline void keep_part(AutogradContext* ctx, const VocabShard& shard,
                      const TokenLogpsOptions& options) {
  ctx->saved_data["first_label"] = shard.first_label;
  ctx->saved_data["vocab_size"] = shard.vocab_size;
  ctx->saved_data["ignore_index"] = options.ignore_index;
  ctx->saved_data["shift"] = options.shift;
  ctx->saved_data["logit_scale"] = options.logit_scale;
  ctx->saved_data["softcap"] = softcap_or_zero(options);
}

// Calls an op below autograd. The program's collectives are not called there.
template <typename Call>
auto below_autograd(const Call& call) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return with_argument_errors(call);
}

inline at::Tensor gather(const VocabShard& shard, const at::Tensor& tensor) {
  const at::Tensor gathered = shard.all_gather(tensor);
  TORCH_CHECK_VALUE(
      gathered.dim() == tensor.dim() + 1 && gathered.sizes().slice(1) == tensor.sizes(),
      "shard.all_gather: expected [K, ...] from tensors of shape ", tensor.sizes(), ", got ",
      gathered.sizes());
  return gathered;
}

inline at::Tensor reduce(const VocabShard& shard, const at::Tensor& tensor) {
  const std::vector<int64_t> sizes = tensor.sizes().vec();
  const at::Tensor reduced = shard.all_reduce(tensor);
  TORCH_CHECK_VALUE(reduced.sizes() == at::IntArrayRef(sizes), "shard.all_reduce: expected ",
                    at::IntArrayRef(sizes), ", got ", reduced.sizes());
  return reduced;
}

// stats of all shards -> logps, max, sum_exp
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_shards(const char* name,
                                                                   const at::Tensor& shards,
                                                                   const at::Tensor& labels,
                                                                   const TokenLogpsOptions& options,
                                                                   bool float64) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, int64_t, bool, bool);
  const auto op = find_op<Signature>(name);
  return below_autograd(
      [&] { return op.call(shards, labels, options.ignore_index, options.shift, float64); });
}

struct TokenLogpsOfShards : torch::autograd::Function<TokenLogpsOfShards> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits,
                            const at::Tensor& labels, const VocabShard& shard,
                            const TokenLogpsOptions& options) {
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t,
                                 bool, double, double);
    static const auto op = find_op<Signature>("simpo_ext::token_logps_shard");
    const at::Tensor stats = below_autograd([&] {
      return op.call(logits, labels, shard.first_label, shard.vocab_size, options.ignore_index,
                     options.shift, options.logit_scale, softcap_or_zero(options));
    });
    auto [logps, max, sum_exp] = merge_shards("simpo_ext::token_logps_merge", gather(shard, stats),
                                              labels, options, logits.scalar_type() == at::kDouble);
    keep_part(ctx, shard, options);
    ctx->saved_data["inplace"] = options.inplace_backward;
    ctx->save_for_backward({logits, labels, max, sum_exp});
    return logps;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Signature =
        at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, int64_t, int64_t, int64_t, bool, double, double);
    using InplaceSignature =
        void(const at::Tensor&, at::Tensor&, const at::Tensor&, const at::Tensor&,
             const at::Tensor&, int64_t, int64_t, int64_t, bool, double, double);
    static const auto op = find_op<Signature>("simpo_ext::token_logps_shard_backward");
    static const auto inplace_op =
        find_op<InplaceSignature>("simpo_ext::token_logps_shard_backward_");
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto call = [&](const auto& handle, auto& logits) {
      return below_autograd([&] {
        return handle.call(grads[0], logits, saved[1], saved[2], saved[3],
                           data["first_label"].toInt(), data["vocab_size"].toInt(),
                           data["ignore_index"].toInt(), data["shift"].toBool(),
                           data["logit_scale"].toDouble(), data["softcap"].toDouble());
      });
    };
    at::Tensor dlogits;
    if (data["inplace"].toBool()) {
      dlogits = saved[0].detach();
      call(inplace_op, dlogits);
      torch::autograd::impl::bump_version(saved[0]);  // as in TokenLogps
    } else {
      dlogits = call(op, saved[0]);
    }
    return {dlogits, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

struct LinearTokenLogpsOfShards : torch::autograd::Function<LinearTokenLogpsOfShards> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& labels, const VocabShard& shard,
                            const TokenLogpsOptions& options, int64_t logits_budget_bytes,
                            int64_t num_valid_tokens) {
    using Signature = std::tuple<at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
        int64_t, int64_t, int64_t, bool, double, double, int64_t, c10::SymInt);
    static const auto op = find_op<Signature>("simpo_ext::linear_token_logps_shard");
    auto [stats, kept_logits] = below_autograd([&] {
      return op.call(hidden, weight, bias, labels, shard.first_label, shard.vocab_size,
                     options.ignore_index, options.shift, options.logit_scale,
                     softcap_or_zero(options), logits_budget_bytes, num_valid_tokens);
    });
    auto [logps, max, sum_exp] =
        merge_shards("simpo_ext::linear_token_logps_merge", gather(shard, stats), labels, options,
                     hidden.scalar_type() == at::kDouble);
    keep_part(ctx, shard, options);
    ctx->saved_data["shard"] =
        c10::IValue::make_capsule(c10::make_intrusive<KeptVocabShard>(shard));
    ctx->save_for_backward(
        {hidden, weight, bias.value_or(at::Tensor()), labels, max, sum_exp, kept_logits});
    return logps;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward();
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
        int64_t, int64_t, bool, double, double, bool, bool, bool);
    using ScatterSignature =
        at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool);
    static const auto op = find_op<Signature>("simpo_ext::linear_token_logps_shard_backward");
    static const auto scatter_op =
        find_op<ScatterSignature>("simpo_ext::linear_token_logps_dhidden");
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor bias = if_defined(saved[2]);
    std::array<bool, 3> needs{};  // hidden, weight, bias
    for (size_t i = 0; i < needs.size(); ++i) {
      needs[i] = saved[i].defined() && ctx->needs_input_grad(i);
    }
    auto& data = ctx->saved_data;
    const int64_t ignore_index = data["ignore_index"].toInt();
    const bool shift = data["shift"].toBool();
    auto [dhidden_rows, dweight, dbias] = below_autograd([&] {
      return op.call(grads[0], saved[0], saved[1], bias, saved[3], saved[4], saved[5], saved[6],
                     data["first_label"].toInt(), data["vocab_size"].toInt(), ignore_index, shift,
                     data["logit_scale"].toDouble(), data["softcap"].toDouble(), needs[0], needs[1],
                     needs[2]);
    });
    variable_list result(9);
    if (needs[0]) {
      const auto kept =
          c10::static_intrusive_pointer_cast<KeptVocabShard>(data["shard"].toCapsule());
      const at::Tensor summed = reduce(kept->shard, dhidden_rows);
      result[0] = below_autograd(
          [&] { return scatter_op.call(summed, saved[0], saved[3], ignore_index, shift); });
    }
    if (needs[1]) result[1] = dweight;
    if (needs[2]) result[2] = dbias;
    return result;
  }
};

inline void check_shard(const VocabShard& shard, int64_t columns) {
  TORCH_CHECK_TYPE(shard.all_gather && shard.all_reduce,
                   "shard: expected functions for all_gather and all_reduce, got an empty one");
  TORCH_CHECK_VALUE(shard.first_label >= 0 && columns <= shard.vocab_size - shard.first_label,
                    "shard: expected labels in [0, ", shard.vocab_size, "), got ", columns,
                    " labels that start at ", shard.first_label);
}

}  // namespace detail

// logits [B, T, V_k] of this rank's labels, labels [B, T] -> [B, T] with the same bits on every
// rank; 0 at masked positions. The forward calls all_gather once, with [3, B, T] float64. The
// backward calls no collective.
inline at::Tensor vocab_parallel_token_logps(const at::Tensor& logits, const at::Tensor& labels,
                                             const VocabShard& shard,
                                             const TokenLogpsOptions& options = {}) {
  detail::check_token_arguments(logits, labels, options);
  detail::check_shard(shard, logits.size(2));
  return detail::TokenLogpsOfShards::apply(logits, labels.to(at::kLong), shard, options);
}

// hidden [B, T, H], weight [V_k, H] with this rank's rows of lm_head, labels [B, T] -> [B, T]. The
// forward calls all_gather once, with [3, R] float64 for R valid tokens. If hidden requires a
// gradient, the backward calls all_reduce once, with [R, H] float32, or float64 for float64.
// hidden's gradient is then that of the whole vocabulary.
inline at::Tensor vocab_parallel_linear_token_logps(const at::Tensor& hidden,
                                                    const at::Tensor& weight,
                                                    const at::Tensor& labels,
                                                    const VocabShard& shard,
                                                    const TokenLogpsOptions& options = {},
                                                    const LinearOptions& linear = {}) {
  detail::check_linear_shapes(hidden, weight, labels, linear);
  detail::check_token_options(options);
  detail::check_shard(shard, weight.size(0));
  const at::Tensor long_labels = labels.to(at::kLong);
  const detail::LinearInputs in =
      detail::linear_inputs(hidden, weight, long_labels, options, linear);
  return detail::LinearTokenLogpsOfShards::apply(in.hidden, in.weight, in.bias, long_labels, shard,
                                                 options, in.logits_budget_bytes, in.rows);
}

}  // namespace simpo_ext
