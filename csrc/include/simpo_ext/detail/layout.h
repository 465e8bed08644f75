// Converts the layouts of simpo_ext.h to that of the ops: tokens [B, T, ...] and targets [B, T],
// which are already aligned if several sequences share a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "simpo_ext/detail/autograd.h"
#include "simpo_ext/detail/checks.h"
#include "simpo_ext/options.h"

namespace simpo_ext::detail {

// Tokens [B, T, ...] and labels [B, T]. A flat layout becomes a batch of one row. Its targets will
// be aligned, so its shift is false.
struct Batch {
  at::Tensor tokens;
  at::Tensor labels;  // int64
  Layout layout;      // int64 and float64 tensors on the device of the tokens
  bool shift;
};

// Adds a first dimension of 1 to the tokens and labels of a flat layout, unless it is there.
inline std::pair<at::Tensor, at::Tensor> as_one_row(const char* name, const at::Tensor& tokens,
                                                    const at::Tensor& labels, int64_t token_dim) {
  const bool has_row = labels.dim() == 2;
  const int64_t dim = (has_row ? 2 : 1) + token_dim;
  const bool is_flat =
      labels.dim() >= 1 && tokens.dim() == dim && (!has_row || tokens.size(0) == 1) &&
      tokens.sizes().slice(0, static_cast<size_t>(dim - token_dim)) == labels.sizes();
  TORCH_CHECK_VALUE(is_flat, name,
                    ", labels: expected shapes [N, ...] and [N], or [1, N, ...] and [1, N], with "
                    "cu_seqlens, got ",
                    tokens.sizes(), " and ", labels.sizes());
  if (has_row) return {tokens, labels};
  return {tokens.unsqueeze(0), labels.unsqueeze(0)};
}

// Returns the indices as int64 on the device of the tokens.
inline at::Tensor check_indices(const char* name, const at::Tensor& tensor, int64_t dim,
                                const at::Tensor& tokens) {
  check_tensor(name, tensor);
  TORCH_CHECK_TYPE(at::isIntegralType(tensor.scalar_type(), false), name,
                   ": expected an integer dtype, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim && (dim == 1 ? tensor.size(0) > 0 : tensor.size(1) == 2),
                    name, ": expected shape ", dim == 1 ? "[S + 1]" : "[P, 2]", ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == tokens.device() || tensor.device().is_cpu(), name,
                    ": expected a tensor on ", tokens.device(), " like the tokens, or on cpu, got ",
                    tensor.device());
  return tensor.to(at::kLong).to(tokens.device());
}

// The label that scores each position. cu_seqlens must have passed check_indices.
inline at::Tensor aligned_targets(const at::Tensor& labels, const OptionalTensor& cu_seqlens,
                                  int64_t num_labels, const TokenLogpsOptions& options) {
  if (!cu_seqlens.has_value()) return labels;
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, int64_t, bool);
  static const auto op = find_op<Signature>("simpo_ext::sequence_targets");
  at::AutoDispatchBelowADInplaceOrView guard;
  return with_argument_errors([&] {
    return op.call(labels, *cu_seqlens, num_labels, options.ignore_index, options.shift);
  });
}

// Targets [B, T], and options with the shift that they need.
inline std::pair<at::Tensor, TokenLogpsOptions> align(const Batch& batch, int64_t num_labels,
                                                      TokenLogpsOptions options) {
  const at::Tensor targets =
      aligned_targets(batch.labels.to(at::kLong), batch.layout.cu_seqlens, num_labels, options);
  options.shift = batch.shift;
  return {targets, options};
}

// Checks the values of a layout that is on the CPU while the tokens are on a GPU, whose kernels
// report no errors. CPU kernels check the values themselves.
inline void check_layout_values(const at::Tensor& tokens, const Layout& layout) {
  if (tokens.device().is_cpu()) return;
  if (layout.cu_seqlens.has_value() && layout.cu_seqlens->device().is_cpu()) {
    const at::Tensor ends = layout.cu_seqlens->to(at::kLong).contiguous();
    int64_t before = 0;
    for (int64_t i = 0; i < ends.numel(); ++i) {
      const int64_t end = ends.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_VALUE(end >= before && end <= tokens.size(1), "cu_seqlens[", i,
                        "]: expected a value in [", before, ", ", tokens.size(1), "], got ", end);
      before = end;
    }
  }
  if (layout.pairs.has_value() && layout.pairs->device().is_cpu()) {
    const int64_t S =
        layout.cu_seqlens.has_value() ? layout.cu_seqlens->size(0) - 1 : tokens.size(0);
    const at::Tensor pairs = layout.pairs->to(at::kLong).contiguous();
    for (int64_t i = 0; i < pairs.numel(); ++i) {
      const int64_t sequence = pairs.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_INDEX(sequence >= 0 && sequence < S, "pairs[", i / 2, ", ", i % 2,
                        "] is out of range: expected a sequence in [0, ", S, "), got ", sequence);
    }
  }
}

// A checked batch of pairs or of sequences. token_dim: the number of dimensions of a token.
inline Batch as_batch(const char* name, const at::Tensor& tokens, const at::Tensor& labels,
                      const Layout& layout, int64_t token_dim, bool of_pairs, bool shift) {
  check_tensor(name, tokens);
  check_tensor("labels", labels);
  Batch batch{tokens, labels, {}, shift};
  if (layout.cu_seqlens.has_value()) {
    std::tie(batch.tokens, batch.labels) = as_one_row(name, tokens, labels, token_dim);
    batch.layout.cu_seqlens = check_indices("cu_seqlens", *layout.cu_seqlens, 1, tokens);
    batch.shift = false;
  }
  if (!of_pairs) {
    check_layout_values(batch.tokens, {layout.cu_seqlens, {}, {}});
    return batch;
  }
  TORCH_CHECK_VALUE(batch.tokens.dim() == 2 + token_dim, name, ": expected ", 2 + token_dim,
                    " dimensions, got ", batch.tokens.sizes());
  const int64_t S =
      layout.cu_seqlens.has_value() ? batch.layout.cu_seqlens->size(0) - 1 : batch.tokens.size(0);
  int64_t P = S / 2;
  if (layout.pairs.has_value()) {
    batch.layout.pairs = check_indices("pairs", *layout.pairs, 2, tokens);
    P = layout.pairs->size(0);
  } else {
    const bool is_flat = layout.cu_seqlens.has_value();
    TORCH_CHECK_VALUE(S % 2 == 0, is_flat ? "cu_seqlens" : name, ": expected an even ",
                      is_flat ? "number of sequences (P chosen, then P rejected)"
                              : "B (P chosen rows, then P rejected rows)",
                      ", or pairs, got ", S);
  }
  if (layout.pair_weight.has_value()) {
    const at::Tensor& weight = *layout.pair_weight;
    check_tensor("pair_weight", weight);
    TORCH_CHECK_TYPE(!weight.is_complex(), "pair_weight: expected real numbers, got ",
                     weight.scalar_type());
    TORCH_CHECK_VALUE(!weight.requires_grad(),
                      "pair_weight: expected constants, got a tensor that requires grad");
    TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == P, "pair_weight: expected shape [", P,
                      "], got ", weight.sizes());
    check_same_device("pair_weight", weight, name, tokens);
    batch.layout.pair_weight = weight.to(at::kDouble);
  }
  check_layout_values(batch.tokens, layout);
  return batch;
}

}  // namespace simpo_ext::detail
