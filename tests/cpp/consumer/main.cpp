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

// As FLAT_TABLE of the test.
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
  require_error<c10::ValueError>("even B", call({.cu_seqlens = ends}));
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

at::Tensor gradient_of(const at::Tensor& logits, const at::Tensor& labels,
                       const simpo_ext::SimPOOptions& options) {
  const at::Tensor leaf = logits.clone().requires_grad_();
  simpo_ext::simpo_loss(leaf * 1.0, labels, options).loss.sum().backward();
  return leaf.grad();
}

// The loss and what it is made of, and the gradients of hidden, weight and bias.
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
  // What is frozen gets no gradient, and what is not the same as ever.
  const at::Tensor x = hidden.clone().requires_grad_(), w = weight.clone().requires_grad_();
  linear_token_logps(x, w, labels).sum().backward();
  const at::Tensor only_w = weight.clone().requires_grad_();
  linear_token_logps(hidden, only_w, labels).sum().backward();
  require(at::equal(only_w.grad(), w.grad()), "the weight's gradient beside frozen hidden states");
  const at::Tensor only_x = hidden.clone().requires_grad_();
  linear_token_logps(only_x, weight, labels).sum().backward();
  require(at::equal(only_x.grad(), x.grad()), "the hidden states' gradient beside a frozen weight");
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

  require_error<c10::ValueError>("[V, H]", [&] { linear_token_logps(hidden, weight.t(), labels); });
  require_error<c10::ValueError>(
      "[V]", [&] { linear_token_logps(hidden, weight, labels, {}, {.bias = bias.slice(0, 1)}); });
  require_error<c10::TypeError>("weight: expected dtype",
                                [&] { linear_token_logps(hidden, narrow(weight), labels); });
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
  const at::Tensor logps = linear_token_logps(x, weight, labels).sum();
  require_error<c10::Error>("double backward", [&] {
    torch::autograd::grad({logps}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true);
  });
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
  save(argv[2], results);
  check_layout_errors(flat_logits, flat_labels, layout);

  check_linear(hidden, weight, bias, labels);
  check_errors(logits, labels.clone());
  std::puts("ok");
  return 0;
}
