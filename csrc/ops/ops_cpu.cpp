// The ops on CPU tensors.

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace simpo_ext::ops {
namespace {

// Threads come from torch's intra-op pool, so torch.set_num_threads governs them.
constexpr ParallelFor kTorchThreads{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      torch::stable::parallel_for(begin, end, grain,
                                  [body, context](int64_t b, int64_t e) { body(b, e, context); });
    }};

class Cpu {
 public:
  Cpu(const Tensor& tensor, const char* name) { check(tensor, name); }

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }

  void token_logps(const TokenLogpsArgs& args) const {
    check_labels_in_range(cpu::token_logps(args, kTorchThreads), args.targets.ignore_index, args.V);
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_labels_in_range(cpu::token_logps_backward(args, kTorchThreads), args.targets.ignore_index,
                          args.V);
  }
  void sequence_logps(const SequenceLogpsArgs& args) const {
    cpu::sequence_logps(args, kTorchThreads);
  }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    cpu::sequence_logps_backward(args, kTorchThreads);
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    cpu::preference_loss(args, kTorchThreads);
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    cpu::preference_loss_backward(args, kTorchThreads);
  }
};

}  // namespace
}  // namespace simpo_ext::ops

STABLE_TORCH_LIBRARY_IMPL(simpo_ext, CPU, m) {
  simpo_ext::ops::register_ops<simpo_ext::ops::Cpu>(m);
}
