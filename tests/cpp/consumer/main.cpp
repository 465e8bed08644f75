// A program that uses simpo_ext as C++ users do, through find_package(simpo_ext). It reads a batch
// from the file named first, and writes the loss, its parts and the gradients to the file named
// second, for the test to compare with Python's; errors it checks itself. Exits non-zero on the
// first thing that is wrong.

#include <simpo_ext/simpo_ext.h>
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <typename Error, typename Function>
void require_error(const std::string& message_part, const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    require(std::string(error.what()).find(message_part) != std::string::npos, error.what());
    return;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wrong kind of error for '%s': %s\n", message_part.c_str(), error.what());
    std::exit(1);
  }
  std::fprintf(stderr, "no error for '%s'\n", message_part.c_str());
  std::exit(1);
}

std::vector<at::Tensor> load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue list = torch::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

void save(const char* path, const std::vector<at::Tensor>& tensors) {
  const std::vector<char> bytes = torch::pickle_save(tensors);
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The options of the test's table, in its order.
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

at::Tensor gradient_of(const at::Tensor& logits, const at::Tensor& labels,
                       const simpo_ext::SimPOOptions& options) {
  const at::Tensor leaf = logits.clone().requires_grad_();
  simpo_ext::simpo_loss(leaf * 1.0, labels, options).loss.sum().backward();
  return leaf.grad();
}

void check_errors(const at::Tensor& logits, const at::Tensor& labels) {
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
  const at::Tensor leaf = logits.clone().requires_grad_();
  const at::Tensor sequences = simpo_ext::sequence_logps(leaf, labels, /*average_log_prob=*/false);
  sequences.sum().backward();
  results.insert(results.end(), {sequences.detach(), leaf.grad()});
  save(argv[2], results);

  check_errors(logits, labels.clone());
  std::puts("ok");
  return 0;
}
