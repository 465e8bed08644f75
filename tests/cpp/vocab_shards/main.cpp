// A program whose ranks are three threads, each with a shard of the vocabulary and its own
// collectives. It reads a batch from its first argument, and writes each rank's log-probabilities
// and gradients to its second, for the test to compare with Python's. Exits with 1 at the first
// failed check.

#include <simpo_ext/vocab_parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <array>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "../require.h"

namespace {

constexpr int kRanks = 3;
constexpr std::array<int64_t, kRanks + 1> kCuts{0, 20, 20, 60};  // the second rank has no label

// The collectives. Each rank puts its tensor into its own place.
class Ranks {
 public:
  simpo_ext::VocabShard shard(size_t rank) {
    return {
        .first_label = kCuts[rank],
        .vocab_size = kCuts[kRanks],
        .all_gather = [this, rank](const at::Tensor& x) { return at::stack(exchange(rank, x)); },
        .all_reduce = [this,
                       rank](const at::Tensor& x) { return at::stack(exchange(rank, x)).sum(0); },
    };
  }

 private:
  std::vector<at::Tensor> exchange(size_t rank, const at::Tensor& tensor) {
    places_[rank] = tensor;
    barrier_.arrive_and_wait();
    std::vector<at::Tensor> all(places_.begin(), places_.end());
    barrier_.arrive_and_wait();
    return all;
  }

  std::barrier<> barrier_{kRanks};
  std::array<at::Tensor, kRanks> places_;
};

at::Tensor leaf_of(const at::Tensor& tensor) { return tensor.detach().clone().requires_grad_(); }

// Log-probabilities and the gradients of logits, then those of hidden, weight and bias.
std::vector<at::Tensor> results_of(const std::vector<at::Tensor>& batch,
                                   const simpo_ext::VocabShard& shard, int64_t end,
                                   simpo_ext::TokenLogpsOptions options, int64_t budget) {
  const int64_t first = shard.first_label;
  const at::Tensor &labels = batch.at(1), &upstream = batch.at(5);
  const at::Tensor logits = leaf_of(batch.at(0).slice(2, first, end));
  const at::Tensor logps = simpo_ext::vocab_parallel_token_logps(logits, labels, shard, options);
  logps.backward(upstream);
  options.inplace_backward = true;
  const at::Tensor again = leaf_of(logits);
  simpo_ext::vocab_parallel_token_logps(again * 1.0, labels, shard, options).backward(upstream);
  require(at::equal(again.grad(), logits.grad()), "in place: the same bits");

  const at::Tensor hidden = leaf_of(batch.at(2)),
                   weight = leaf_of(batch.at(3).slice(0, first, end));
  const at::Tensor bias = leaf_of(batch.at(4).slice(0, first, end));
  const at::Tensor linear_logps = simpo_ext::vocab_parallel_linear_token_logps(
      hidden, weight, labels, shard, options, {.bias = bias, .logits_budget_bytes = budget});
  linear_logps.backward(upstream);
  return {logps.detach(), logits.grad(), linear_logps.detach(),
          hidden.grad(),  weight.grad(), bias.grad()};
}

void check_errors(const std::vector<at::Tensor>& batch) {
  using simpo_ext::vocab_parallel_linear_token_logps, simpo_ext::vocab_parallel_token_logps;
  const auto same = [](const at::Tensor& x) { return x; };
  const auto stacked = [](const at::Tensor& x) { return x.unsqueeze(0); };
  const at::Tensor &logits = batch.at(0), &labels = batch.at(1), &hidden = batch.at(2);
  const at::Tensor& weight = batch.at(3);
  require_error<c10::ValueError>("expected labels in [0, 60), got 60 labels that start at 1", [&] {
    vocab_parallel_token_logps(logits, labels, {1, 60, stacked, same});
  });
  require_error<c10::TypeError>("all_gather and all_reduce", [&] {
    vocab_parallel_linear_token_logps(hidden, weight, labels, {0, 60, stacked, {}});
  });
  require_error<c10::ValueError>("shard.all_gather: expected [K, ...]", [&] {
    vocab_parallel_token_logps(logits, labels, {0, 60, same, same});
  });
  const at::Tensor leaf = leaf_of(hidden);
  require_error<c10::ValueError>("shard.all_reduce: expected", [&] {
    vocab_parallel_linear_token_logps(leaf, weight, labels, {0, 60, stacked, stacked})
        .sum()
        .backward();
  });
  require_error<c10::IndexError>("out of range", [&] {
    vocab_parallel_token_logps(logits, at::full_like(labels, 60), {0, 60, stacked, same});
  });
  const at::Tensor logps =
      vocab_parallel_linear_token_logps(leaf, weight, labels, {0, 60, stacked, same}).sum();
  require_error<c10::Error>("double backward", [&] {
    torch::autograd::grad({logps}, {leaf}, {}, /*retain_graph=*/true, /*create_graph=*/true);
  });
}

std::vector<at::Tensor> load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 3, "usage: vocab_shards INPUT OUTPUT");
  const std::vector<at::Tensor> batch = load(argv[1]);
  // The same as in the test.
  const std::vector<simpo_ext::TokenLogpsOptions> option_table{
      {}, {.shift = false, .logit_scale = 0.5, .softcap = 20.0}};
  std::vector<at::Tensor> results;
  for (const simpo_ext::TokenLogpsOptions& options : option_table) {
    Ranks ranks;
    std::array<std::vector<at::Tensor>, kRanks> of_ranks;
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([&, rank] {
        of_ranks[rank] =
            results_of(batch, ranks.shard(rank), kCuts[rank + 1], options, int64_t{1} << 30);
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& of_rank : of_ranks)
      results.insert(results.end(), of_rank.begin(), of_rank.end());
  }
  const std::vector<char> bytes = torch::jit::pickle_save(results);
  std::ofstream(argv[2], std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  check_errors(batch);
  std::puts("ok");
  return 0;
}
