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

at::Tensor gradient_of(const at::Tensor& logits, const at::Tensor& labels,
                       const simpo_ext::SimPOOptions& options) {
  const at::Tensor leaf = logits.clone().requires_grad_();
  simpo_ext::simpo_loss(leaf * 1.0, labels, options).loss.backward();
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
  require_error<c10::ValueError>("leaf", [&] {
    simpo_ext::token_logps(logits.clone().requires_grad_(), labels, {.inplace_backward = true});
  });
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 3, "usage: consumer INPUT OUTPUT");
  const std::vector<at::Tensor> batch = load(argv[1]);
  const at::Tensor &logits = batch.at(0), &labels = batch.at(1);
  simpo_ext::SimPOOptions options{
      .beta = 2.5, .gamma = 1.5, .label_smoothing = 0.1, .sft_weight = 0.25};
  options.tokens.softcap = 20.0;

  const simpo_ext::SimPOOutput out = simpo_ext::simpo_loss(logits, labels, options);
  const at::Tensor gradient = gradient_of(logits, labels, options);
  options.tokens.inplace_backward = true;
  require(gradient_of(logits, labels, options).equal(gradient),
          "in-place gradient has the same bits");

  const at::Tensor leaf = logits.clone().requires_grad_();
  const at::Tensor sequences = simpo_ext::sequence_logps(leaf, labels, /*average_log_prob=*/false);
  sequences.sum().backward();
  save(argv[2], {out.loss, out.losses, out.chosen_logps, out.rejected_logps, out.chosen_rewards,
                 out.rejected_rewards, out.sft_loss, out.metrics, gradient, sequences.detach(),
                 leaf.grad()});

  check_errors(logits, labels.clone());
  std::puts("ok");
  return 0;
}
