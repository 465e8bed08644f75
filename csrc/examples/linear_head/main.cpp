// Trains a linear head on preference pairs: hidden states in, SimPO's loss out, torch::optim steps.
//
//   linear_head [--steps N] [--logits] [--sgd] [--data FILE]
//
// --logits computes the logits and their loss. Without it, the loss comes from hidden states and
// weight, and the logits are never all in memory. --sgd uses SGD with momentum instead of AdamW.
// --data reads a file that Python's torch.save([hidden, labels, weight], FILE) wrote: [2P, T, H]
// float32, [2P, T] int64 and [V, H] float32, the initial weight. Without it, all three are random.

#include <simpo_ext/simpo_ext.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Arguments {
  int steps = 10;
  bool logits = false;
  bool sgd = false;
  std::string data;
};

Arguments parse(const std::vector<std::string>& given) {
  Arguments arguments;
  for (size_t i = 0; i < given.size(); ++i) {
    const bool has_value = i + 1 < given.size();
    if (given[i] == "--logits") {
      arguments.logits = true;
    } else if (given[i] == "--sgd") {
      arguments.sgd = true;
    } else if (given[i] == "--steps" && has_value) {
      arguments.steps = std::stoi(given[++i]);
    } else if (given[i] == "--data" && has_value) {
      arguments.data = given[++i];
    } else {
      throw std::invalid_argument("expected [--steps N] [--logits] [--sgd] [--data FILE], got " +
                                  given[i]);
    }
  }
  return arguments;
}

struct Data {
  torch::Tensor hidden;  // [2P, T, H]: P chosen completions, then P rejected ones
  torch::Tensor labels;  // [2P, T]; -100 at the tokens of the prompt, which are not scored
  torch::Tensor weight;  // [V, H]
};

Data random_data() {
  constexpr int64_t P = 8, T = 64, H = 128, V = 1000, kPrompt = 16;
  torch::manual_seed(0);
  Data data{torch::randn({2 * P, T, H}), torch::randint(V, {2 * P, T}, torch::kLong),
            torch::randn({V, H}) * 0.02};
  data.labels.slice(1, 0, kPrompt).fill_(-100);
  return data;
}

Data read_data(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const torch::IValue list = torch::pickle_load(bytes);
  const auto& tensors = list.toListRef();
  return {tensors.at(0).toTensor(), tensors.at(1).toTensor(), tensors.at(2).toTensor()};
}

std::unique_ptr<torch::optim::Optimizer> make_optimizer(std::vector<torch::Tensor> parameters,
                                                        bool sgd) {
  if (sgd) {
    return std::make_unique<torch::optim::SGD>(std::move(parameters),
                                               torch::optim::SGDOptions(0.5).momentum(0.9));
  }
  return std::make_unique<torch::optim::AdamW>(std::move(parameters),
                                               torch::optim::AdamWOptions(0.005));
}

void train(const Arguments& arguments) {
  const Data data = arguments.data.empty() ? random_data() : read_data(arguments.data);
  const int64_t V = data.weight.size(0), H = data.weight.size(1);
  torch::nn::Linear head(torch::nn::LinearOptions(H, V).bias(false));
  {
    const torch::NoGradGuard no_grad;
    head->weight.copy_(data.weight);
  }
  const auto optimizer = make_optimizer(head->parameters(), arguments.sgd);
  const simpo_ext::SimPOOptions options{.beta = 2.0, .gamma_beta_ratio = 0.5, .sft_weight = 0.1};

  for (int step = 0; step < arguments.steps; ++step) {
    optimizer->zero_grad();
    const simpo_ext::SimPOOutput out =
        arguments.logits
            ? simpo_ext::simpo_loss(head->forward(data.hidden), data.labels, options)
            : simpo_ext::linear_simpo_loss(data.hidden, head->weight, data.labels, options);
    out.loss.backward();
    optimizer->step();

    const std::map<std::string, double> metrics = out.read_metrics();
    std::printf("step %d  loss %.9g  accuracy %.3f  margin %.9g\n", step, out.loss.item<float>(),
                metrics.at("rewards/accuracies"), metrics.at("rewards/margins"));
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    train(parse({argv + 1, argv + argc}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "linear_head: %s\n", error.what());
    return 1;
  }
  return 0;
}
