// The kernels of cuda/ as members of a Device: see implementations.h.
#pragma once

#include "core/kernels.h"

namespace simpo_ext::ops {

// Derived has stream(), and check_launch(error), which throws unless the error is 0.
template <class Derived>
class CudaKernels {
 public:
  int64_t shared_segments(DType dtype, int64_t N, int64_t V) const {
    return cuda::shared_segments(dtype, N, V);
  }
  void token_logps(const TokenLogpsArgs& args) const { launch(cuda::token_logps, args); }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    launch(cuda::token_logps_backward, args);
  }
  // The host does not know the number of valid tokens, so all R rows are computed. Rows past the
  // last valid token have no effect.
  int64_t select_tokens(const SelectTokensArgs& args) const {
    launch(cuda::select_tokens, args);
    return args.R;
  }
  void gather_rows(const GatherRowsArgs& args) const { launch(cuda::gather_rows, args); }
  void write_logps(const WriteLogpsArgs& args) const { launch(cuda::write_logps, args); }
  void put_label_gradients(const PutLabelGradientsArgs& args) const {
    launch(cuda::put_label_gradients, args);
  }
  void add_partial(const AddPartialArgs& args) const { launch(cuda::add_partial, args); }
  void hidden_gradient(const HiddenGradientArgs& args) const {
    launch(cuda::hidden_gradient, args);
  }
  void merge_shards(const MergeShardsArgs& args) const { launch(cuda::merge_shards, args); }
  void add_label_shares(const AddLabelSharesArgs& args) const {
    launch(cuda::add_label_shares, args);
  }
  void scatter_rows(const ScatterRowsArgs& args) const { launch(cuda::scatter_rows, args); }
  void sequence_targets(const SequenceTargetsArgs& args) const {
    launch(cuda::sequence_targets, args);
  }
  void sequence_logps(const SequenceLogpsArgs& args) const { launch(cuda::sequence_logps, args); }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    launch(cuda::sequence_logps_backward, args);
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    launch(cuda::preference_loss, args);
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    launch(cuda::preference_loss_backward, args);
  }

 private:
  template <class Args>
  void launch(int (*kernel)(const Args&, cuda::Stream), const Args& args) const {
    const Derived& device = static_cast<const Derived&>(*this);
    device.check_launch(kernel(args, device.stream()));
  }
};

}  // namespace simpo_ext::ops
