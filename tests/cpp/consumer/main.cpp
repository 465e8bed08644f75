// A program that uses simpo_ext through find_package(simpo_ext), as C++ users do. It reads a batch
// from its first argument, and writes the loss, its parts and the gradients to its second, for the
// test to compare with Python's. It prints the library's build information, and checks errors in
// errors.cpp. Exits with 1 at the first failed check.

#include <simpo_ext/simpo_ext.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "../require.h"
#include "budget.h"
#include "errors.h"

namespace {

std::vector<at::Tensor> load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

void save(const char* path, const std::vector<at::Tensor>& tensors) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensors);
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The same options as in the test's table, in the same order.
std::vector<simpo_ext::SimPOOptions> option_table() {
  using namespace simpo_ext;
  return {
      {},
      {.beta = 2.5,
       .gamma = 1.5,
       .label_smoothing = 0.1,
       .sft_weight = 0.25,
       .tokens = {.softcap = 20.0}},
      {.gamma_beta_ratio = 0.1, .loss_type = LossType::kHinge, .reduction = Reduction::kSum},
      {.sft_weight = 0.5, .average_log_prob = false, .reduction = Reduction::kNone},
      {.sft_weight = 0.5, .sft_reduction = SftReduction::kToken, .tokens = {.shift = false}},
      {.sft_weight = 0.5, .pair_normalizer = 7.0},
      {.sft_weight = 0.5,
       .sft_reduction = SftReduction::kToken,
       .pair_normalizer = 7.0,
       .token_normalizer = 11.0},
      {.empty = Empty::kNan, .tokens = {.ignore_index = 3, .logit_scale = 0.5}},
  };
}

// The same as FLAT_TABLE of the test.
std::vector<simpo_ext::SimPOOptions> flat_option_table() {
  using namespace simpo_ext;
  return {
      {},
      {.gamma = 0.5, .alpha = 0.3, .sft_weight = 0.5, .sft_reduction = SftReduction::kToken},
      {.loss_type = LossType::kIpo, .reduction = Reduction::kSum, .tokens = {.shift = false}},
  };
}

std::vector<at::Tensor> tensors_of(const simpo_ext::SimPOOutput& out) {
  return {out.loss,           out.losses,           out.chosen_logps, out.rejected_logps,
          out.chosen_rewards, out.rejected_rewards, out.sft_loss,     out.metrics};
}

// Packed logits and hidden states with shared sequences and weights.
std::vector<at::Tensor> flat_results(const at::Tensor& logits, const at::Tensor& hidden,
                                     const at::Tensor& weight, const at::Tensor& labels,
                                     const simpo_ext::Layout& layout) {
  std::vector<at::Tensor> results;
  const auto append = [&](const simpo_ext::SimPOOutput& out, const at::Tensor& leaf) {
    out.loss.sum().backward();
    const std::vector<at::Tensor> tensors = tensors_of(out);
    results.insert(results.end(), tensors.begin(), tensors.end());
    results.push_back(leaf.grad());
  };
  for (const simpo_ext::SimPOOptions& options : flat_option_table()) {
    const at::Tensor z = logits.clone().requires_grad_(), x = hidden.clone().requires_grad_();
    append(simpo_ext::simpo_loss(z, labels, options, layout), z);
    append(simpo_ext::linear_simpo_loss(x, weight, labels, options, {}, layout), x);
    const simpo_ext::Layout sequences{.cu_seqlens = layout.cu_seqlens};
    const at::Tensor logps = simpo_ext::token_logps(z, labels, options.tokens, sequences);
    const at::Tensor of_hidden =
        simpo_ext::linear_token_logps(x, weight, labels, options.tokens, {}, sequences);
    require(logps.sizes() == labels.sizes() && of_hidden.sizes() == labels.sizes(), "one a label");
    const at::Tensor leaf = logps.detach().requires_grad_();
    append(simpo_ext::simpo_loss_from_token_logps(leaf, labels, options, layout), leaf);
    results.push_back(simpo_ext::sequence_logps(logits, labels, true, options.tokens, sequences));
  }
  return results;
}

// Losses from sequence log-probabilities, counts, and a loss with these counts as normalizers.
std::vector<at::Tensor> sequence_results(const at::Tensor& logits, const at::Tensor& hidden,
                                         const at::Tensor& weight, const at::Tensor& labels,
                                         const simpo_ext::Layout& layout) {
  using namespace simpo_ext;
  const at::Tensor leaf = sequence_logps(logits, labels).detach().requires_grad_();
  const int64_t P = leaf.size(0) / 2;
  const SimPOOutput out = simpo_loss_from_logps(
      leaf.slice(0, 0, P), leaf.slice(0, P).to(at::kDouble),
      {.beta = 2.5, .gamma = 1.5, .label_smoothing = 0.1, .alpha = 0.3}, at::arange(1, P + 1));
  out.losses.sum().backward();
  std::vector<at::Tensor> results{out.losses, out.chosen_rewards, out.rejected_rewards,
                                  leaf.grad()};
  require(at::equal(out.loss, out.losses.mean()), "the mean of all pairs");

  const SimPOOptions options{.sft_weight = 0.5,
                             .sft_reduction = SftReduction::kToken,
                             .empty = Empty::kDrop,
                             .tokens = {.ignore_index = 3}};
  const Layout sequences{.cu_seqlens = layout.cu_seqlens, .pairs = layout.pairs};
  const at::Tensor flat_hidden = hidden.flatten(0, 1), flat_labels = labels.flatten();
  for (const PairCounts& counts :
       {count_pairs(labels, options), count_pairs(flat_labels, options, sequences)}) {
    results.insert(results.end(), {counts.pairs, counts.tokens});
  }
  SimPOOptions divided = options;
  const PairCounts counts = count_pairs(labels, options);
  divided.pair_normalizer = counts.pairs;
  divided.token_normalizer = counts.tokens * 2;
  const SimPOOutput by_counts = linear_simpo_loss(hidden, weight, labels, divided);
  require(by_counts.loss.scalar_type() == at::kFloat, "the dtype of a divided loss");
  results.insert(results.end(), {by_counts.loss, by_counts.sft_loss});

  const std::map<std::string, double> metrics = by_counts.read_metrics();
  require(metrics.size() == kMetricNames.size(), "a metric for each name");
  for (const char* name : kMetricNames) {  // in the order of Python's names
    results.push_back(at::scalar_tensor(metrics.at(name), at::kDouble));
  }
  return results;
}

at::Tensor gradient_of(const at::Tensor& logits, const at::Tensor& labels,
                       const simpo_ext::SimPOOptions& options) {
  const at::Tensor leaf = logits.clone().requires_grad_();
  simpo_ext::simpo_loss(leaf * 1.0, labels, options).loss.sum().backward();
  return leaf.grad();
}

// The loss and its parts, and the gradients of hidden, weight and bias.
std::vector<at::Tensor> linear_results(const at::Tensor& hidden, const at::Tensor& weight,
                                       const at::Tensor& bias, const at::Tensor& labels,
                                       const simpo_ext::SimPOOptions& options) {
  const at::Tensor x = hidden.clone().requires_grad_(), w = weight.clone().requires_grad_();
  const at::Tensor b = bias.clone().requires_grad_();
  const simpo_ext::SimPOOutput out =
      simpo_ext::linear_simpo_loss(x, w, labels, options, {.bias = b, .logits_budget_bytes = 0});
  out.loss.sum().backward();
  return {out.loss,
          out.losses,
          out.chosen_logps,
          out.rejected_logps,
          out.chosen_rewards,
          out.rejected_rewards,
          out.sft_loss,
          out.metrics,
          x.grad(),
          w.grad(),
          b.grad()};
}

void check_linear(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
                  const at::Tensor& labels) {
  using simpo_ext::linear_token_logps;
  // A frozen tensor gets no gradient, and the others get the same as before.
  const at::Tensor x = hidden.clone().requires_grad_(), w = weight.clone().requires_grad_();
  linear_token_logps(x, w, labels).sum().backward();
  const at::Tensor only_w = weight.clone().requires_grad_();
  linear_token_logps(hidden, only_w, labels).sum().backward();
  require(at::equal(only_w.grad(), w.grad()), "the weight's gradient with frozen hidden states");
  const at::Tensor only_x = hidden.clone().requires_grad_();
  linear_token_logps(only_x, weight, labels).sum().backward();
  require(at::equal(only_x.grad(), x.grad()), "the hidden states' gradient with a frozen weight");
  require(!linear_token_logps(hidden, weight, labels).requires_grad(), "nothing to differentiate");

  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor cast = linear_token_logps(hidden, weight, labels, {}, {.bias = bias});
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  const auto narrow = [](const at::Tensor& tensor) { return tensor.to(at::kBFloat16); };
  const at::Tensor narrowed =
      linear_token_logps(narrow(hidden), narrow(weight), labels, {}, {.bias = narrow(bias)});
  require(cast.scalar_type() == at::kFloat && at::equal(cast, narrowed), "autocast");
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 3, "usage: consumer INPUT OUTPUT");
  const std::vector<at::Tensor> batch = load(argv[1]);
  const at::Tensor &logits = batch.at(0), &labels = batch.at(1);
  std::vector<at::Tensor> results;
  for (simpo_ext::SimPOOptions options : option_table()) {
    const simpo_ext::SimPOOutput out = simpo_ext::simpo_loss(logits, labels, options);
    const at::Tensor gradient = gradient_of(logits, labels, options);
    options.tokens.inplace_backward = true;
    const at::Tensor inplace = gradient_of(logits, labels, options);
    require(at::allclose(inplace, gradient, 0.0, 0.0, /*equal_nan=*/true),
            "in place: the same bits");
    results.insert(results.end(),
                   {out.loss, out.losses, out.chosen_logps, out.rejected_logps, out.chosen_rewards,
                    out.rejected_rewards, out.sft_loss, out.metrics, gradient});
  }
  const at::Tensor &hidden = batch.at(2), &weight = batch.at(3), &bias = batch.at(4);
  for (const simpo_ext::SimPOOptions& options : option_table()) {
    const std::vector<at::Tensor> of_options =
        linear_results(hidden, weight, bias, labels, options);
    results.insert(results.end(), of_options.begin(), of_options.end());
  }
  const at::Tensor leaf = logits.clone().requires_grad_();
  const at::Tensor sequences = simpo_ext::sequence_logps(leaf, labels, /*average_log_prob=*/false);
  sequences.sum().backward();
  results.insert(results.end(), {sequences.detach(), leaf.grad()});
  const simpo_ext::Layout layout{
      .cu_seqlens = batch.at(5), .pairs = batch.at(6), .pair_weight = batch.at(7)};
  const at::Tensor flat_logits = logits.flatten(0, 1), flat_labels = labels.flatten();
  const std::vector<at::Tensor> of_flat =
      flat_results(flat_logits, hidden.flatten(0, 1), weight, flat_labels, layout);
  results.insert(results.end(), of_flat.begin(), of_flat.end());
  const std::vector<at::Tensor> of_sequences =
      sequence_results(logits, hidden, weight, labels, layout);
  results.insert(results.end(), of_sequences.begin(), of_sequences.end());
  save(argv[2], results);

  check_linear(hidden, weight, bias, labels);
  check_errors(batch);
  check_default_budget();
  const simpo_ext::BuildInfo info = simpo_ext::build_info();
  std::printf("%s\n%s\n%s\n%s\n%s\n%d\n", info.version, info.compiler, info.cpu_capability,
              info.torch_target, info.cuda_archs, info.cuda_runtime_version);
  return 0;
}
