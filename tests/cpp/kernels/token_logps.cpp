// token_logps and its backward for whole batches. Rows that must not be read or written are
// poisoned, and rows in pieces have the same bits with any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../poison.h"
#include "check.h"
#include "core/kernels.h"
#include "core/row_report.h"
#include "cpu/tasks.h"
#include "threads.h"

namespace simpo_ext::test {
namespace {

// One thread, which gets the whole range.
constexpr ParallelFor kOneThread{[](int64_t begin, int64_t end, int64_t, ParallelFor::Body body,
                                    void* context) { body(begin, end, context); },
                                 [] { return int64_t{1}; }};

// One thread, which gets the smallest possible ranges, from last to first.
constexpr ParallelFor kBackwards{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      const int64_t step = std::max<int64_t>(grain, 1);
      for (int64_t b = begin + (end - begin - 1) / step * step; b >= begin; b -= step) {
        body(b, std::min(b + step, end), context);
      }
    },
    [] { return int64_t{1}; }};

double z_of(double x, const LogitTransform& transform) {
  const double scaled = transform.logit_scale * x, cap = transform.softcap;
  return cap == 0.0 ? scaled : cap * std::tanh(scaled / cap);
}

double slope_of(double x, const LogitTransform& transform) {
  if (transform.softcap == 0.0) return transform.logit_scale;
  const double ratio = z_of(x, transform) / transform.softcap;
  return transform.logit_scale * (1.0 - ratio * ratio);
}

// A batch of 3 sequences of 5 tokens, a third of them masked.
template <typename T>
struct TokenLogpsCase {
  using Scalar = Compute<T>;
  static constexpr int64_t B = 3, T_ = 5, kRows = B * T_, kIgnore = -100;

  int64_t V;
  LogitTransform transform;
  TokenStrides strides{T_ * V, V};
  size_t row_bytes = static_cast<size_t>(V) * sizeof(T);
  // One element before the first row, so that no row is aligned to more than its element.
  std::vector<T> memory, out_memory;
  T *logits, *dlogits;
  std::vector<int64_t> labels;
  Targets targets;
  std::vector<Scalar> logps, max, grad;
  std::vector<double> sum_exp;

  TokenLogpsCase(int64_t vocabulary, bool shift, const LogitTransform& logit_transform,
                 std::mt19937& random)
      : V(vocabulary),
        transform(logit_transform),
        memory(static_cast<size_t>(1 + kRows * V)),
        out_memory(memory.size()),
        logits(memory.data() + 1),
        dlogits(out_memory.data() + 1),
        labels(kRows),
        targets{labels.data(), {T_, 1}, B, T_, kIgnore, shift},
        logps(kRows),
        max(kRows),
        grad(kRows),
        sum_exp(kRows) {
    context = std::string(Named<T>::name) + ", V = " + std::to_string(V);
    std::normal_distribution<double> normal(0.0, 3.0);
    for (T& x : memory) x = narrow<T>(static_cast<Scalar>(normal(random)));
    for (int64_t i = 0; i < kRows; ++i) {
      labels[static_cast<size_t>(i)] = i % 3 == 1 ? kIgnore : static_cast<int64_t>(random() % V);
    }
    // For a row in pieces, the last logit of one piece and the first of the next.
    if (V > 2 * cpu::kPieceLength) {
      labels[0] = cpu::kPieceLength - 1;
      labels[3] = cpu::kPieceLength;
      labels[5] = 2 * cpu::kPieceLength;
    }
    for (size_t i = 0; i < grad.size(); ++i) {
      grad[i] = i % 4 == 2 ? Scalar(0) : Scalar(0.25) * Scalar(i + 1);
    }
  }

  template <typename Function>
  void for_each_row(T* data, const Function& function) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < T_; ++t) function(b, t, data + strides.offset(b, t), b * T_ + t);
    }
  }
  bool is_valid(int64_t b, int64_t t) const { return targets.is_valid(b, t); }
  bool needs_softmax(int64_t b, int64_t t) const {
    return is_valid(b, t) && grad[static_cast<size_t>(b * T_ + t)] != Scalar(0);
  }

  // Calls function while all rows of data without the predicate are poisoned.
  template <typename Predicate, typename Function>
  void with_poison(T* data, const Predicate& is_used, const Function& function) {
    // AddressSanitizer poisons groups of 8 bytes, so bytes that share a group with another row stay
    // accessible.
    for_each_row(data, [&](int64_t b, int64_t t, T* x, int64_t) {
      if (!is_used(b, t)) POISON(x, row_bytes);
    });
    for_each_row(data, [&](int64_t b, int64_t t, T* x, int64_t) {
      if (is_used(b, t)) UNPOISON(x, row_bytes);
    });
    function();
    for_each_row(data, [&](int64_t, int64_t, T* x, int64_t) { UNPOISON(x, row_bytes); });
  }

  TokenLogpsArgs forward_args() {
    return {Named<T>::dtype, V,          logits,        strides, targets, transform,
            logps.data(),    max.data(), sum_exp.data()};
  }
  TokenLogpsBackwardArgs backward_args() {
    return {Named<T>::dtype, V,       logits,     strides,        targets, transform,
            grad.data(),     {T_, 1}, max.data(), sum_exp.data(), dlogits, strides};
  }
  void forward(ParallelFor parallel_for) {
    with_poison(
        logits, [&](int64_t b, int64_t t) { return is_valid(b, t); },
        [&] {
          require(!cpu::token_logps(forward_args(), parallel_for).found(), "labels are in range");
        });
  }
  void backward(ParallelFor parallel_for) {
    with_poison(
        logits, [&](int64_t b, int64_t t) { return needs_softmax(b, t); },
        [&] {
          require(!cpu::token_logps_backward(backward_args(), parallel_for).found(),
                  "labels are in range");
        });
  }
};

template <typename Value>
bool equal_bits(const std::vector<Value>& a, const std::vector<Value>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(Value)) == 0;
}

template <typename T>
void check_values(TokenLogpsCase<T>& test) {
  const bool is_double = sizeof(Compute<T>) == 8;
  const double tolerance = is_double ? 1e-13 : 2e-6;
  const double rounding = is_double ? 1e-13 : sizeof(T) == 4 ? 1e-5 : 4e-3 * 4;
  std::vector<double> terms(static_cast<size_t>(test.V));
  test.for_each_row(test.logits, [&](int64_t b, int64_t t, const T* x, int64_t row) {
    const size_t i = static_cast<size_t>(row);
    const T* dx = test.dlogits + test.strides.offset(b, t);
    double sum = 0.0;
    if (test.is_valid(b, t)) {
      for (int64_t v = 0; v < test.V; ++v) {
        const double term = std::exp(z_of(static_cast<double>(widen(x[v])), test.transform));
        terms[static_cast<size_t>(v)] = term;
        sum += term;
      }
      const double label_z =
          z_of(static_cast<double>(widen(x[test.targets.at(b, t)])), test.transform);
      const double got = static_cast<double>(test.logps[i]), expected = label_z - std::log(sum);
      require(std::fabs(got - expected) <= tolerance, "logps", got, expected);
      const double lse = static_cast<double>(test.max[i]) + std::log(test.sum_exp[i]);
      require(std::fabs(lse - std::log(sum)) <= tolerance, "max and sum_exp", lse, std::log(sum));
    } else {
      require(test.logps[i] == 0 && test.max[i] == 0 && test.sum_exp[i] == 0, "masked: all 0");
    }
    for (int64_t v = 0; v < test.V; ++v) {
      const double got = static_cast<double>(widen(dx[v]));
      if (!test.needs_softmax(b, t)) {
        require(got == 0.0, "a row without gradient is exactly 0", got);
        continue;
      }
      const double p = terms[static_cast<size_t>(v)] / sum;
      const double expected = static_cast<double>(test.grad[i]) *
                              ((v == test.targets.at(b, t)) - p) *
                              slope_of(static_cast<double>(widen(x[v])), test.transform);
      require(std::fabs(got - expected) <= rounding, "dlogits", got, expected);
    }
  });
}

// With any number of threads, and any ranges.
template <typename T>
void check_same_bits_for_any_threads(TokenLogpsCase<T>& test) {
  const auto logps = test.logps, max = test.max;
  const std::vector<double> sum_exp = test.sum_exp;
  const std::vector<T> out_memory = test.out_memory;
  for (const ParallelFor& parallel_for : {kOneThread, kBackwards}) {
    test.forward(parallel_for);
    std::memset(static_cast<void*>(test.dlogits), 0x5a, test.row_bytes * test.kRows);
    test.backward(parallel_for);
    require(equal_bits(logps, test.logps) && equal_bits(max, test.max) &&
                equal_bits(sum_exp, test.sum_exp) && equal_bits(out_memory, test.out_memory),
            "the same bits for any number of threads");
  }
}

// If dlogits holds zeros, rows without a gradient are not written. Here they hold other values, to
// show that.
template <typename T>
void check_gradient_into_zeros(TokenLogpsCase<T>& test) {
  const std::vector<T> written = test.out_memory;
  std::memset(static_cast<void*>(test.dlogits), 0x5a, test.row_bytes * test.kRows);
  const std::vector<T> untouched = test.out_memory;
  TokenLogpsBackwardArgs args = test.backward_args();
  args.dlogits_holds_zeros = true;
  test.with_poison(
      test.dlogits, [&](int64_t b, int64_t t) { return test.needs_softmax(b, t); },
      [&] { cpu::token_logps_backward(args, kThreads); });
  test.for_each_row(test.dlogits, [&](int64_t b, int64_t t, const T* dx, int64_t) {
    const std::vector<T>& expected = test.needs_softmax(b, t) ? written : untouched;
    require(std::memcmp(dx, expected.data() + (dx - test.out_memory.data()), test.row_bytes) == 0,
            "rows without a gradient are not written, others as ever");
  });
}

// A report reads only the rows that it needs and does not change the other outputs. Any number of
// threads gives the same report, and so does a vocabulary in two parts. row_reports.cpp checks the
// sums.
template <typename T>
void check_report(TokenLogpsCase<T>& test) {
  const std::vector<Compute<T>> logps = test.logps, max = test.max;
  const std::vector<double> sum_exp = test.sum_exp;
  std::vector<double> mean_logit(test.kRows), entropy(test.kRows);
  for (const bool all_positions : {false, true}) {
    std::vector<double> first_mean, first_entropy;
    for (const ParallelFor& threads : {kThreads, kOneThread, kBackwards}) {
      std::fill(mean_logit.begin(), mean_logit.end(), 7.0);
      std::fill(entropy.begin(), entropy.end(), 7.0);
      TokenLogpsArgs args = test.forward_args();
      args.mean_logit = mean_logit.data();
      args.entropy = entropy.data();
      args.all_positions = all_positions;
      test.with_poison(
          test.logits, [&](int64_t b, int64_t t) { return all_positions || test.is_valid(b, t); },
          [&] { cpu::token_logps(args, threads); });
      require(equal_bits(test.logps, logps) && equal_bits(test.max, max) &&
                  equal_bits(test.sum_exp, sum_exp),
              "a report changes nothing else");
      if (first_mean.empty()) first_mean = mean_logit, first_entropy = entropy;
      require(equal_bits(mean_logit, first_mean) && equal_bits(entropy, first_entropy),
              "a report of any number of threads");
    }
    test.for_each_row(test.logits, [&](int64_t b, int64_t t, const T* x, int64_t row) {
      const size_t i = static_cast<size_t>(row);
      double sum = 0.0;
      for (int64_t v = 0; v < test.V; ++v) {
        sum += z_of(static_cast<double>(widen(x[v])), test.transform);
      }
      const bool is_read = all_positions || test.is_valid(b, t);
      const double mean = is_read ? sum / static_cast<double>(test.V) : 0.0;
      require(std::fabs(mean_logit[i] - mean) <= 4e-6, "mean_logit", mean_logit[i], mean);
      require(test.is_valid(b, t) ? entropy[i] >= 0.0 : entropy[i] == 0.0, "entropy", entropy[i]);
    });
    if (test.V < 2) continue;

    std::vector<double> sum_z(test.kRows), sum_exp_z(test.kRows);
    std::vector<Compute<T>> label_z(test.kRows);
    const int64_t half = test.V / 2;
    for (const int64_t begin : {int64_t{0}, half}) {
      TokenLogpsArgs args = test.forward_args();
      args.V = begin == 0 ? half : test.V - half;
      args.logits = test.logits + begin;
      args.logps = nullptr;
      args.first_label = begin;
      args.num_labels = test.V;
      args.continues = begin > 0;
      args.label_z = label_z.data();
      args.mean_logit = sum_z.data();
      args.entropy = sum_exp_z.data();
      args.all_positions = all_positions;
      cpu::token_logps(args, kThreads);
    }
    for (size_t i = 0; i < sum_z.size(); ++i) {
      const double mean = sum_z[i] / static_cast<double>(test.V);
      require(std::fabs(mean - mean_logit[i]) <= 4e-6, "mean_logit of parts", mean, mean_logit[i]);
      if (test.sum_exp[i] == 0.0) continue;  // masked
      const double nats = RowReport{sum_z[i], sum_exp_z[i]}.entropy(test.sum_exp[i]);
      require(std::fabs(nats - entropy[i]) <= 1e-5, "entropy of parts", nats, entropy[i]);
    }
    test.logps = logps, test.max = max, test.sum_exp = sum_exp;
  }
}

template <typename T>
void check_batch(int64_t V, bool shift, const LogitTransform& transform, std::mt19937& random) {
  TokenLogpsCase<T> test(V, shift, transform, random);
  test.forward(kThreads);
  test.backward(kThreads);
  check_values(test);
  check_same_bits_for_any_threads(test);
  check_report(test);
  const std::vector<T> out_memory = test.out_memory;
  check_gradient_into_zeros(test);

  TokenLogpsBackwardArgs backward = test.backward_args();
  backward.dlogits = test.logits;
  cpu::token_logps_backward(backward, kThreads);
  require(std::memcmp(test.logits, out_memory.data() + 1, test.row_bytes * test.kRows) == 0,
          "in place gives the same bits");

  for (const int64_t bad : {V, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    test.labels[8] = bad;
    const LabelError error = cpu::token_logps(test.forward_args(), kThreads);
    require(error.b == 1 && error.position == 3 && error.label == bad, "the bad label is found");
  }
}

// The special values of csrc/README.md, in any piece of a long row and with any label.
template <typename T>
void check_edges(int64_t V, std::mt19937& random) {
  using Scalar = Compute<T>;
  const Scalar infinity = std::numeric_limits<Scalar>::infinity();
  const auto of = [](Scalar value) { return narrow<T>(value); };
  const auto is_nan = [](T value) { return std::isnan(widen(value)); };
  for (const int64_t label : {int64_t{0}, V / 2, V - 1}) {
    TokenLogpsCase<T> test(V, false, {1.0, 0.0}, random);
    std::fill(test.labels.begin(), test.labels.end(), label);
    std::fill(test.grad.begin(), test.grad.end(), Scalar(-1.5));
    const auto row = [&](int64_t i) { return test.logits + i * V; };
    row(0)[0] = of(std::numeric_limits<Scalar>::quiet_NaN());
    row(1)[V - 1] = of(std::numeric_limits<Scalar>::quiet_NaN());
    row(2)[V / 2] = of(infinity);
    row(3)[V - 1] = of(infinity);
    std::fill_n(row(4), V, of(-infinity));
    constexpr int64_t kSpoilt = 5;
    // Enough -inf for whole pieces without a finite logit.
    std::fill_n(row(5), V - 1, of(-infinity));
    std::fill_n(row(6) + 1, V - 1, of(-infinity));
    row(7)[label] = of(-infinity);
    // The label has all the probability: the other logits are too far below.
    row(8)[label] = of(Scalar(30000));
    test.forward(kThreads);
    test.backward(kThreads);
    const auto dx = [&](int64_t i, int64_t v) { return test.dlogits[i * V + v]; };
    for (int64_t i = 0; i < kSpoilt; ++i) {
      require(std::isnan(test.logps[static_cast<size_t>(i)]), "logp NaN", static_cast<double>(i));
      for (int64_t v = 0; v < V; ++v) {
        require(is_nan(dx(i, v)), "gradient row NaN", static_cast<double>(i),
                static_cast<double>(v));
      }
    }
    for (int64_t i = kSpoilt; i <= 8; ++i) {
      for (int64_t v = 0; v < V; ++v) {
        require(!is_nan(dx(i, v)), "gradient row not NaN", static_cast<double>(i));
      }
    }
    // One finite logit has all the probability. The gradients of the others, except the label's,
    // are 0.
    const int64_t only[] = {V - 1, 0};
    for (const int64_t i : {5, 6}) {
      const bool is_label = label == only[i - 5];
      const double logp = static_cast<double>(test.logps[static_cast<size_t>(i)]);
      require(is_label ? logp == 0.0 : logp == -INFINITY,
              "label on -inf, or with all the probability", logp);
      for (int64_t v = 0; v < V; ++v) {
        const double expected = is_label                         ? 0.0
                                : v == label || v == only[i - 5] ? (v == label ? -1.5 : 1.5)
                                                                 : 0.0;
        const double got = static_cast<double>(widen(dx(i, v)));
        require(got == expected, "gradient where one logit is finite", got, expected);
      }
    }
    require(V == 1 || std::isinf(test.logps[7]), "label on -inf");
    require(V == 1 || widen(dx(7, label)) == Scalar(-1.5), "gradient of a label on -inf");
    require(test.logps[8] == Scalar(0), "the label's is all there is",
            static_cast<double>(test.logps[8]));
    for (int64_t v = 0; v < V; ++v) require(widen(dx(8, v)) == Scalar(0), "its gradient is 0");
  }
}

}  // namespace

void check_token_logps() {
  std::mt19937 random(0);
  const LogitTransform plain = kTransforms[0].transform;
  // Work for several threads: rows, and pieces of a row.
  for (const int64_t V : {3, 20000, 70000}) {
    check_batch<float>(V, true, plain, random);
    check_batch<BFloat16>(V, false, plain, random);
  }
  if (kThreadsAlone) return;
  for_each_dtype([&](auto element) {
    using T = decltype(element);
    // 1; less than a vector; one less than 1024, exactly 1024, and more.
    for (const int64_t V : {1, 3, 1023, 1024, 1025}) {
      for (const bool shift : {false, true}) check_batch<T>(V, shift, plain, random);
    }
    for (const NamedTransform& named : kTransforms) {
      check_batch<T>(1025, true, named.transform, random);
    }
    // Three pieces for each row, the last one odd. With float64, the gradient is large enough for
    // streaming stores.
    check_batch<T>(140000, false, plain, random);
    for (const int64_t V : {2, 300, 140000}) check_edges<T>(V, random);
  });
  context.clear();
}

}  // namespace simpo_ext::test
