// The ops on CPU tensors.

#include <torch/csrc/stable/ops.h>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/cpu_memory.h"
#include "ops/errors.h"
#include "ops/implementations.h"
#include "ops/linear/plan.h"
#include "ops/registration.h"

namespace simpo_ext::ops {
namespace {

// Threads come from torch's intra-op pool, so torch.set_num_threads governs them.
constexpr ParallelFor kTorchThreads{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      torch::stable::parallel_for(begin, end, grain,
                                  [body, context](int64_t b, int64_t e) { body(b, e, context); });
    },
    [] { return static_cast<int64_t>(torch::stable::get_num_threads()); }};

class Cpu {
 public:
  static constexpr int64_t kChunkColumns = kCpuChunkColumns;

  Cpu(const Tensor& tensor, const char* name) { check(tensor, name); }

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }

  LargeTensor new_large(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return new_large_cpu_tensor(like, sizes);
  }
  Tensor new_large_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return new_large_cpu_tensor_for_writing(like, sizes);
  }

  // On a CPU, torch's product of bfloat16 matrices has a bfloat16 result.
  static constexpr bool adds_products() { return false; }
  void add_product(const Tensor&, const Tensor&, const Tensor&, bool) const {}

  int64_t shared_segments(DType, int64_t, int64_t) const { return 0; }
  void token_logps(const TokenLogpsArgs& args) const {
    check_labels_in_range(cpu::token_logps(args, kTorchThreads), args.targets.ignore_index,
                          args.num_labels);
  }
  void token_logps_backward(const TokenLogpsBackwardArgs& args) const {
    check_labels_in_range(cpu::token_logps_backward(args, kTorchThreads), args.targets.ignore_index,
                          args.num_labels);
  }
  int64_t select_tokens(const SelectTokensArgs& args) const {
    const cpu::Selection selection = cpu::select_tokens(args);
    check_labels_in_range(selection.error, args.targets.ignore_index, args.num_labels);
    check_num_valid_tokens(selection.count, args.R);
    return selection.count;
  }
  void gather_rows(const GatherRowsArgs& args) const { cpu::gather_rows(args, kTorchThreads); }
  void write_logps(const WriteLogpsArgs& args) const { cpu::write_logps(args); }
  void put_label_gradients(const PutLabelGradientsArgs& args) const {
    cpu::put_label_gradients(args);
  }
  void add_partial(const AddPartialArgs& args) const { cpu::add_partial(args, kTorchThreads); }
  void hidden_gradient(const HiddenGradientArgs& args) const {
    cpu::hidden_gradient(args, kTorchThreads);
  }
  void merge_shards(const MergeShardsArgs& args) const { cpu::merge_shards(args); }
  void add_label_shares(const AddLabelSharesArgs& args) const {
    cpu::add_label_shares(args, kTorchThreads);
  }
  void scatter_rows(const ScatterRowsArgs& args) const { cpu::scatter_rows(args, kTorchThreads); }
  void sequence_targets(const SequenceTargetsArgs& args) const {
    const cpu::TargetError error = cpu::sequence_targets(args);
    check_layout(error.layout);
    check_labels_in_range(error.label, args.labels.ignore_index, args.num_labels, true);
  }
  void sequence_logps(const SequenceLogpsArgs& args) const {
    check_layout(cpu::sequence_logps(args, kTorchThreads));
  }
  void sequence_logps_backward(const SequenceLogpsBackwardArgs& args) const {
    check_layout(cpu::sequence_logps_backward(args, kTorchThreads));
  }
  void preference_loss(const PreferenceLossArgs& args) const {
    check_layout(cpu::preference_loss(args, kTorchThreads));
  }
  void preference_loss_backward(const PreferenceLossBackwardArgs& args) const {
    check_layout(cpu::preference_loss_backward(args, kTorchThreads));
  }
};

}  // namespace

void register_cpu_ops(Library& m) { register_ops<Cpu>(m); }

}  // namespace simpo_ext::ops
