// The arguments that locate and score positions: labels, the vocabulary, sequences and pairs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "core/loss_math.h"
#include "core/views.h"
#include "ops/checks.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

// How labels score logits. All ops from logits or hidden states have these arguments.
struct Scoring {
  int64_t ignore_index;
  bool shift;
  LogitTransform transform;
};

template <class Device>
Targets make_targets(const Device& device, const Tensor& labels, int64_t ignore_index, bool shift) {
  device.check(labels, "labels");
  check_dtype(labels, ScalarType::Long, "labels");
  check_dim(labels, 2, "labels", "[B, T]");
  return {labels.const_data_ptr<int64_t>(),
          token_strides(labels),
          labels.size(0),
          labels.size(1),
          ignore_index,
          shift};
}

// The labels of the V columns of logits: [first_label, first_label + V) of num_labels.
struct VocabPart {
  int64_t first_label;
  int64_t num_labels;

  void check(int64_t V) const {
    STD_TORCH_CHECK(first_label >= 0 && V <= num_labels - first_label,
                    "first_label, num_labels: expected the ", V,
                    " labels that start at first_label to lie in [0, num_labels), got ",
                    first_label, " and ", num_labels);
  }
};

// The sequences of a batch, and which of them are pairs. Holds the tensors that the views point to.
class Layout {
 public:
  // With cu_seqlens, the targets must be aligned already, because a shift would cross the ends of
  // sequences.
  template <class Device>
  Layout(const Device& device, const Targets& targets, const std::optional<Tensor>& cu_seqlens) {
    sequences_ = {nullptr, targets.B};
    if (!cu_seqlens.has_value()) return;
    STD_TORCH_CHECK(!targets.shift, "shift: expected false with cu_seqlens, got true");
    STD_TORCH_CHECK(targets.B == 1,
                    "labels: expected shape [1, N] with cu_seqlens, got B = ", targets.B);
    cu_seqlens_ = checked(device, *cu_seqlens, ScalarType::Long, "cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0,
                    "cu_seqlens: expected shape [S + 1], got ", shape_text(*cu_seqlens));
    sequences_ = {cu_seqlens_->template const_data_ptr<int64_t>(), cu_seqlens->size(0) - 1};
  }

  template <class Device>
  Layout(const Device& device, const Targets& targets, const std::optional<Tensor>& cu_seqlens,
         const std::optional<Tensor>& pairs, const std::optional<Tensor>& pair_weight)
      : Layout(device, targets, cu_seqlens) {
    if (pairs.has_value()) {
      pairs_tensor_ = checked(device, *pairs, ScalarType::Long, "pairs");
      STD_TORCH_CHECK(pairs->dim() == 2 && pairs->size(1) == 2,
                      "pairs: expected shape [P, 2], got ", shape_text(*pairs));
      pairs_.indices = pairs_tensor_->template const_data_ptr<int64_t>();
      pairs_.P = pairs->size(0);
    } else {
      STD_TORCH_CHECK(sequences_.S % 2 == 0,
                      "token_logps: expected an even number of sequences without pairs (chosen, "
                      "then rejected), got ",
                      sequences_.S);
      pairs_.P = sequences_.S / 2;
    }
    if (pair_weight.has_value()) {
      weights_tensor_ = checked(device, *pair_weight, ScalarType::Double, "pair_weight");
      check_shape(*pair_weight, {pairs_.P}, "pair_weight");
      pairs_.weights = weights_tensor_->template const_data_ptr<double>();
    }
  }

  const Sequences& sequences() const { return sequences_; }
  const Pairs& pairs() const { return pairs_; }
  int64_t S() const { return sequences_.S; }
  int64_t P() const { return pairs_.P; }

  // A tensor [B, T] with the dtype of `like`, for the gradient of token log-probs.
  Tensor new_gradient(const Tensor& like, const Targets& targets) const {
    Tensor gradient = new_empty(like, {targets.B, targets.T});
    // The kernels write no position outside the sequences of the flat layout.
    if (cu_seqlens_.has_value()) torch::stable::zero_(gradient);
    return gradient;
  }

 private:
  template <class Device>
  static Tensor checked(const Device& device, const Tensor& tensor, ScalarType dtype,
                        const char* name) {
    device.check(tensor, name);
    check_dtype(tensor, dtype, name);
    return as_contiguous(tensor);
  }

  std::optional<Tensor> cu_seqlens_, pairs_tensor_, weights_tensor_;
  Sequences sequences_{};
  Pairs pairs_{};
};

}  // namespace simpo_ext::ops
