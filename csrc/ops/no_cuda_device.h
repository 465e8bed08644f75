// The Device for CUDA tensors in a build without nvcc: it refuses every tensor. The other members
// are never called. They are there so that the ops compile.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/linear/plan.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

class Cuda {
 public:
  static constexpr int64_t kChunkColumns = kCudaChunkColumns;

  Cuda(const Tensor&, const char* name) {
    STD_TORCH_CHECK(false, name,
                    ": this build of simpo_ext has kernels for CPU tensors only, got a CUDA "
                    "tensor; move it with .cpu(), or build simpo_ext from source with nvcc");
  }
  void check(const Tensor&, const char*) const {}
  LargeTensor new_large(const Tensor& like, std::initializer_list<int64_t>) const {
    return {like, false};
  }
  Tensor new_large_for_writing(const Tensor& like, std::initializer_list<int64_t>) const {
    return like;
  }
  static constexpr bool adds_products() { return false; }
  void add_product(const Tensor&, const Tensor&, const Tensor&, bool) const {}

  int64_t shared_segments(DType, int64_t, int64_t) const { return 0; }
  void token_logps(const TokenLogpsArgs&) const {}
  void token_logps_backward(const TokenLogpsBackwardArgs&) const {}
  int64_t select_tokens(const SelectTokensArgs&) const { return 0; }
  void gather_rows(const GatherRowsArgs&) const {}
  void write_logps(const WriteLogpsArgs&) const {}
  void put_label_gradients(const PutLabelGradientsArgs&) const {}
  void add_partial(const AddPartialArgs&) const {}
  void hidden_gradient(const HiddenGradientArgs&) const {}
  void merge_shards(const MergeShardsArgs&) const {}
  void add_label_shares(const AddLabelSharesArgs&) const {}
  void scatter_rows(const ScatterRowsArgs&) const {}
  void sequence_targets(const SequenceTargetsArgs&) const {}
  void sequence_logps(const SequenceLogpsArgs&) const {}
  void sequence_logps_backward(const SequenceLogpsBackwardArgs&) const {}
  void preference_loss(const PreferenceLossArgs&) const {}
  void preference_loss_backward(const PreferenceLossBackwardArgs&) const {}
};

}  // namespace simpo_ext::ops
