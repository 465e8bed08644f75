// Errors of the functions of simpo_ext.h. This is a second file of the program that includes it.

#include "errors.h"

#include <simpo_ext/simpo_ext.h>
#include <simpo_ext/vocab_parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

#include "../require.h"

namespace {

using Call = std::function<void()>;

// A tensor without memory on any device, even one that this build of torch does not support.
at::Tensor tensor_on(c10::DeviceType device, c10::DispatchKey key, at::IntArrayRef sizes,
                     at::ScalarType dtype) {
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::DispatchKeySet(key), c10::scalarTypeToTypeMeta(dtype), c10::Device(device, 0));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

void check_devices() {
  const auto refused = [](c10::DeviceType device, c10::DispatchKey key, const char* message) {
    const at::Tensor logits = tensor_on(device, key, {2, 3, 5}, at::kFloat);
    const at::Tensor labels = tensor_on(device, key, {2, 3}, at::kLong);
    const at::Tensor rows = tensor_on(device, key, {5, 5}, at::kFloat);
    const at::Tensor logps = tensor_on(device, key, {2, 3}, at::kFloat);
    const at::Tensor sequences = tensor_on(device, key, {2}, at::kFloat);
    const auto same = [](const at::Tensor& x) { return x; };
    const simpo_ext::VocabShard shard{0, 5, same, same};
    for (const Call& call : std::initializer_list<Call>{
             [&] { simpo_ext::token_logps(logits, labels); },
             [&] { simpo_ext::sequence_logps(logits, labels); },
             [&] { simpo_ext::linear_token_logps(logits, rows, labels); },
             [&] { simpo_ext::simpo_loss(logits, labels); },
             [&] { simpo_ext::linear_simpo_loss(logits, rows, labels); },
             [&] { simpo_ext::simpo_loss_from_token_logps(logps, labels); },
             [&] { simpo_ext::simpo_loss_from_logps(sequences, sequences); },
             [&] { simpo_ext::count_pairs(labels); },
             [&] { simpo_ext::vocab_parallel_token_logps(logits, labels, shard); },
             [&] { simpo_ext::vocab_parallel_linear_token_logps(logits, rows, labels, shard); }}) {
      require_error<c10::Error>(message, call);
    }
  };
  refused(at::kMPS, c10::DispatchKey::MPS, "got a tensor on mps:0; move it with .cpu()");
  refused(at::kXPU, c10::DispatchKey::XPU, "got a tensor on xpu:0; move it with .cpu()");
  if (simpo_ext::build_info().cuda_runtime_version == 0) {
    refused(at::kCUDA, c10::DispatchKey::CUDA, "CPU tensors only, got a tensor on cuda:0");
  }
  // These do not depend on the torch and the library of this program.
  const c10::Device cuda(at::kCUDA, 1);
  const auto of_builds = [&](bool torch_is_for_rocm, bool library_has_cuda) {
    return [&cuda, torch_is_for_rocm, library_has_cuda] {
      simpo_ext::detail::check_device("logits", cuda, torch_is_for_rocm, library_has_cuda);
    };
  };
  of_builds(false, true)();
  require_error<c10::Error>("logits: this build of simpo_ext has kernels for CPU tensors only",
                            of_builds(false, false));
  require_error<c10::Error>("logits: simpo_ext has kernels for NVIDIA GPUs and for CPUs",
                            of_builds(true, true));
  const at::Tensor cpu = at::zeros({2, 3, 5});
  const at::Tensor elsewhere = at::zeros({2, 3}, at::TensorOptions().device(at::kMeta));
  require_error<c10::Error>("labels: simpo_ext has kernels for",
                            [&] { simpo_ext::token_logps(cpu, elsewhere); });
}

void check_undefined_tensors(const at::Tensor& logits, const at::Tensor& labels) {
  using simpo_ext::Layout, simpo_ext::LinearOptions;
  const at::Tensor none, logps = labels.to(at::kFloat), row = logps.select(1, 0);
  const at::Tensor weight = logits.select(0, 0);
  const at::Tensor flat = logits.flatten(0, 1), flat_labels = labels.flatten();
  const auto expect = [](const std::string& name, const Call& call) {
    require_error<c10::TypeError>(name + ": expected a tensor, got an undefined one", call);
  };
  expect("logits", [&] { simpo_ext::token_logps(none, labels); });
  expect("labels", [&] { simpo_ext::token_logps(logits, none); });
  expect("logits", [&] { simpo_ext::sequence_logps(none, labels); });
  expect("labels", [&] { simpo_ext::sequence_logps(logits, none); });
  expect("logits", [&] { simpo_ext::simpo_loss(none, labels); });
  expect("labels", [&] { simpo_ext::simpo_loss(logits, none); });
  expect("hidden", [&] { simpo_ext::linear_token_logps(none, weight, labels); });
  expect("weight", [&] { simpo_ext::linear_token_logps(logits, none, labels); });
  expect("labels", [&] { simpo_ext::linear_token_logps(logits, weight, none); });
  expect("bias", [&] { simpo_ext::linear_simpo_loss(logits, weight, labels, {}, {.bias = none}); });
  expect("token_logps", [&] { simpo_ext::simpo_loss_from_token_logps(none, labels); });
  expect("labels", [&] { simpo_ext::simpo_loss_from_token_logps(logps, none); });
  expect("chosen_logps", [&] { simpo_ext::simpo_loss_from_logps(none, row); });
  expect("rejected_logps", [&] { simpo_ext::simpo_loss_from_logps(row, none); });
  expect("pair_weight", [&] { simpo_ext::simpo_loss_from_logps(row, row, {}, none); });
  expect("labels", [&] { simpo_ext::count_pairs(none); });
  const auto with = [&](const Layout& layout) {
    return [&, layout] { simpo_ext::simpo_loss(logits, labels, {}, layout); };
  };
  expect("cu_seqlens", [&] { simpo_ext::simpo_loss(flat, flat_labels, {}, {.cu_seqlens = none}); });
  expect("logits", [&] { simpo_ext::token_logps(none, flat_labels, {}, {.cu_seqlens = labels}); });
  expect("pairs", with({.pairs = none}));
  expect("pair_weight", with({.pair_weight = none}));
  require_error<c10::TypeError>("pair_normalizer: expected a number or a tensor", [&] {
    simpo_ext::simpo_loss(logits, labels, {.pair_normalizer = none});
  });
}

void check_normalizers(const at::Tensor& logits, const at::Tensor& labels) {
  using simpo_ext::Normalizer, simpo_ext::Reduction;
  const auto with = [&](const Normalizer& normalizer, Reduction reduction = Reduction::kMean) {
    return [&, normalizer, reduction] {
      simpo_ext::simpo_loss(logits, labels,
                            {.reduction = reduction, .pair_normalizer = normalizer});
    };
  };
  require_error<c10::ValueError>("pair_normalizer: expected a finite number > 0", with(0.0));
  require_error<c10::ValueError>("expected none unless reduction is Reduction::kMean",
                                 with(2.0, Reduction::kSum));
  require_error<c10::ValueError>("expected a tensor without dimensions", with(at::ones({1})));
  require_error<c10::TypeError>("a dtype that holds counts", with(at::ones({}, at::kBFloat16)));
}

void check_sequence_logps(const at::Tensor& logps) {
  using simpo_ext::simpo_loss_from_logps;
  require_error<c10::ValueError>("chosen_logps: expected shape [P], got [1, 3]",
                                 [&] { simpo_loss_from_logps(logps.unsqueeze(0), logps); });
  require_error<c10::ValueError>(
      "rejected_logps: expected shape [3] to match chosen_logps, got [2]",
      [&] { simpo_loss_from_logps(logps, logps.slice(0, 1)); });
  require_error<c10::TypeError>("chosen_logps: expected dtype",
                                [&] { simpo_loss_from_logps(logps.to(at::kLong), logps); });
  require_error<c10::ValueError>("beta: expected a finite number > 0, got -1",
                                 [&] { simpo_loss_from_logps(logps, logps, {.beta = -1.0}); });
  require_error<c10::ValueError>("even B",
                                 [&] { simpo_ext::count_pairs(at::ones({3, 2}, at::kInt)); });
  require_error<c10::TypeError>("labels: expected an integer dtype",
                                [&] { simpo_ext::count_pairs(at::ones({2, 2})); });
}

void check_layout_errors(const at::Tensor& logits, const at::Tensor& labels,
                         const simpo_ext::Layout& layout) {
  const auto call = [&](const simpo_ext::Layout& wrong) {
    return [&logits, &labels, wrong] { simpo_ext::simpo_loss(logits, labels, {}, wrong); };
  };
  const at::Tensor &ends = *layout.cu_seqlens, &pairs = *layout.pairs;
  const auto with_ends = [&](const at::Tensor& wrong) {
    return call({.cu_seqlens = wrong, .pairs = pairs});
  };
  require_error<c10::ValueError>("cu_seqlens[1]: expected at least", with_ends(ends.flip(0)));
  require_error<c10::ValueError>("cu_seqlens[5]: expected at most", with_ends(ends + 9));
  require_error<c10::ValueError>("[S + 1]", with_ends(ends.unsqueeze(0)));
  require_error<c10::TypeError>("cu_seqlens: expected an integer dtype",
                                with_ends(ends.to(at::kFloat)));
  require_error<c10::ValueError>("even number of sequences", call({.cu_seqlens = ends}));
  require_error<c10::IndexError>("pairs[0, 0] is out of range",
                                 call({.cu_seqlens = ends, .pairs = pairs + 99}));
  require_error<c10::ValueError>("[P, 2]", call({.cu_seqlens = ends, .pairs = pairs.t()}));
  const auto with_weight = [&](const at::Tensor& wrong) {
    return call({.cu_seqlens = ends, .pairs = pairs, .pair_weight = wrong});
  };
  require_error<c10::ValueError>("pair_weight: expected shape", with_weight(at::ones({1})));
  require_error<c10::ValueError>("requires grad", with_weight(at::ones({4}).requires_grad_()));
  require_error<c10::ValueError>("with cu_seqlens", [&] {
    simpo_ext::simpo_loss(logits.unsqueeze(0), labels, {}, {.cu_seqlens = layout.cu_seqlens});
  });
}

void check_linear_errors(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& labels) {
  using simpo_ext::linear_token_logps;
  require_error<c10::ValueError>("[V, H]", [&] { linear_token_logps(hidden, weight.t(), labels); });
  require_error<c10::ValueError>(
      "[V]", [&] { linear_token_logps(hidden, weight, labels, {}, {.bias = bias.slice(0, 1)}); });
  require_error<c10::TypeError>("weight: expected dtype", [&] {
    linear_token_logps(hidden, weight.to(at::kBFloat16), labels);
  });
  require_error<c10::ValueError>("logits_budget_bytes", [&] {
    linear_token_logps(hidden, weight, labels, {}, {.logits_budget_bytes = -1});
  });
  require_error<c10::ValueError>("num_valid_tokens: expected at least", [&] {
    linear_token_logps(hidden, weight, labels, {}, {.num_valid_tokens = 1});
  });
  require_error<c10::IndexError>("out of range", [&] {
    linear_token_logps(hidden, weight, at::full_like(labels, weight.size(0)));
  });
  require_error<c10::ValueError>("even B", [&] {
    simpo_ext::linear_simpo_loss(hidden.slice(0, 1), weight, labels.slice(0, 1));
  });
  const at::Tensor x = hidden.clone().requires_grad_();
  const at::Tensor logps = linear_token_logps(x, weight, labels).sum();
  require_error<c10::Error>("double backward", [&] {
    torch::autograd::grad({logps}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true);
  });
}

void check_logits_errors(const at::Tensor& logits, const at::Tensor& labels) {
  const auto call = [&](const simpo_ext::SimPOOptions& options) {
    return [&, options] { simpo_ext::simpo_loss(logits, labels, options); };
  };
  require_error<c10::ValueError>("beta", call({.beta = 0.0}));
  require_error<c10::ValueError>("label_smoothing", call({.label_smoothing = 0.6}));
  require_error<c10::ValueError>("gamma", call({.gamma_beta_ratio = 0.5, .gamma = 1.0}));
  require_error<c10::ValueError>("softcap", call({.tokens = {.softcap = -1.0}}));
  require_error<c10::ValueError>(
      "even B", [&] { simpo_ext::simpo_loss(logits.slice(0, 1), labels.slice(0, 1)); });
  require_error<c10::ValueError>("[B, T]",
                                 [&] { simpo_ext::token_logps(logits, labels.slice(1, 1)); });
  require_error<c10::TypeError>("integer",
                                [&] { simpo_ext::token_logps(logits, labels.to(at::kFloat)); });
  require_error<c10::TypeError>("dtype",
                                [&] { simpo_ext::token_logps(logits.to(at::kLong), labels); });
  require_error<c10::IndexError>("out of range", [&] {
    simpo_ext::token_logps(logits, at::full_like(labels, logits.size(2)));
  });
  const at::Tensor leaf = logits.clone().requires_grad_();
  const simpo_ext::TokenLogpsOptions inplace{.inplace_backward = true};
  require_error<c10::ValueError>("leaf", [&] { simpo_ext::token_logps(leaf, labels, inplace); });
  require_error<c10::ValueError>("rows apart", [&] {
    simpo_ext::token_logps((leaf.slice(0, 0, 1) * 1.0).expand_as(logits), labels, inplace);
  });
  require_error<c10::ValueError>("logit_scale", call({.tokens = {.logit_scale = 1e-46}}));
  require_error<c10::ValueError>("token_normalizer", call({.token_normalizer = 3.0}));
  require_error<c10::TypeError>("int64",
                                [&] { simpo_ext::token_logps(logits, labels.to(at::kUInt16)); });
  require_error<c10::Error>("CPU and CUDA tensors",
                            [&] { simpo_ext::token_logps(logits.to(at::kMeta), labels); });

  const at::Tensor loss = simpo_ext::simpo_loss(leaf * 1.0, labels).loss;
  require_error<c10::Error>("double backward", [&] {
    torch::autograd::grad({loss}, {leaf}, {}, /*retain_graph=*/true, /*create_graph=*/true);
  });
  const at::Tensor twice = simpo_ext::token_logps(leaf * 1.0, labels, inplace).sum();
  twice.backward({}, /*retain_graph=*/true);
  require_error<c10::Error>("modified by an inplace operation", [&] { twice.backward(); });
}

}  // namespace

void check_errors(const std::vector<at::Tensor>& batch) {
  const at::Tensor &logits = batch.at(0), &labels = batch.at(1);
  check_logits_errors(logits, labels);
  check_linear_errors(batch.at(2), batch.at(3), batch.at(4), labels);
  check_layout_errors(
      logits.flatten(0, 1), labels.flatten(),
      {.cu_seqlens = batch.at(5), .pairs = batch.at(6), .pair_weight = batch.at(7)});
  check_sequence_logps(at::zeros({3}));
  check_normalizers(logits, labels);
  check_undefined_tensors(logits, labels);
  check_devices();
}
