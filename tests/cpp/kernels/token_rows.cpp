// The kernels that the ops from hidden states call between their products: tokens to rows and back,
// and the vocabulary in parts. Every buffer has exactly the size that the contract states.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/kernels.h"
#include "threads.h"

namespace simpo_ext::test {
namespace {

constexpr int64_t kIgnore = 2;  // a label inside the vocabulary

size_t index(int64_t i) { return static_cast<size_t>(i); }

template <typename T>
std::vector<T> random_elements(int64_t count, double deviation, std::mt19937& random) {
  std::normal_distribution<double> normal(0.0, deviation);
  std::vector<T> elements(index(count));
  for (T& x : elements) x = narrow<T>(static_cast<Compute<T>>(normal(random)));
  return elements;
}

double value(double x) { return x; }
double value(float x) { return static_cast<double>(x); }
template <typename Half>
double value(Half x) {
  return static_cast<double>(widen(x));
}

// ---- which tokens get a row -----------------------------------------------------------------

void check_select_tokens(bool shift, int64_t spare_rows) {
  constexpr int64_t B = 3, T = 5, V = 9;
  // The strides leave a column between labels.
  std::vector<int64_t> memory(2 * B * T, -1);
  const TokenStrides strides{2 * T, 2};
  std::vector<int64_t> positions, labels;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      const int64_t label = b == 1 ? kIgnore : (3 * b + 2 * t) % V;
      memory[index(strides.offset(b, t))] = label;
      if (label == kIgnore || (shift && t == 0)) continue;
      positions.push_back(b * T + t - (shift ? 1 : 0));
      labels.push_back(label);
    }
  }
  const int64_t valid = static_cast<int64_t>(labels.size()), R = valid + spare_rows;
  const Targets targets{memory.data(), strides, B, T, kIgnore, shift};
  std::vector<int64_t> got_positions(index(R)), got_labels(index(R));
  std::vector<float> logps(B * T);
  SelectTokensArgs args{targets,          V,           R, got_positions.data(), got_labels.data(),
                        DType::kBFloat16, logps.data()};
  const cpu::Selection selection = cpu::select_tokens(args);
  require(!selection.error.found() && selection.count == valid, "the valid tokens are counted",
          static_cast<double>(selection.count), static_cast<double>(valid));
  for (int64_t i = 0; i < R; ++i) {
    require(got_positions[index(i)] == (i < valid ? positions[index(i)] : -1), "position",
            static_cast<double>(got_positions[index(i)]), static_cast<double>(i));
    require(got_labels[index(i)] == (i < valid ? labels[index(i)] : kIgnore), "label");
  }
  for (int64_t i = 0; i < B * T; ++i) {
    const bool is_valid = std::find(positions.begin(), positions.end(), i) != positions.end();
    require(is_valid ? std::isnan(logps[index(i)]) : logps[index(i)] == 0.0f,
            "logps before they are known");
  }
  memory[index(strides.offset(2, 3))] = V;
  const LabelError error = cpu::select_tokens(args).error;
  require(error.b == 2 && error.position == 3 && error.label == V, "the bad label is found");
}

template <typename T>
void check_gather_rows(int64_t H, std::mt19937& random) {
  constexpr int64_t B = 2, T_ = 4;
  const TokenStrides strides{H + 1, 2 * (H + 1)};  // transposed, with an element between rows
  const std::vector<T> source = random_elements<T>(B * T_ * (H + 1) - 1, 1.0, random);
  const std::vector<int64_t> positions{1, 3, 6, 7, -1, -1};
  const int64_t R = static_cast<int64_t>(positions.size());
  std::vector<T> rows(index(R * H), narrow<T>(Compute<T>(5)));
  const std::vector<Compute<T>> gradients{Compute<T>(1),    Compute<T>(0), Compute<T>(-2),
                                          Compute<T>(-0.0), Compute<T>(3), Compute<T>(0)};
  for (const bool has_gradients : {false, true}) {
    cpu::gather_rows({Named<T>::dtype, T_, H, R, positions.data(), source.data(), strides,
                      rows.data(), has_gradients ? gradients.data() : nullptr},
                     kThreads);
    for (int64_t i = 0; i < R; ++i) {
      const int64_t p = positions[index(i)];
      const bool has_part = p >= 0 && (!has_gradients || gradients[index(i)] != Compute<T>(0));
      for (int64_t h = 0; h < H; ++h) {
        const double expected =
            has_part ? value(source[index(strides.offset(p / T_, p % T_) + h)]) : 0.0;
        require(value(rows[index(i * H + h)]) == expected, "gathered",
                value(rows[index(i * H + h)]), expected);
      }
    }
  }
}

// ---- the vocabulary in parts ----------------------------------------------------------------

// R rows of logits whose parts end at bounds, as one matrix and as a matrix for each part.
template <typename T>
struct PartsCase {
  using Scalar = Compute<T>;
  static constexpr int64_t R = 7;

  std::vector<int64_t> bounds;
  int64_t V = bounds.back();
  LogitTransform transform;
  std::vector<T> logits;
  std::vector<int64_t> labels;
  Targets targets{labels.data(), {0, 1}, 1, R, kIgnore, false};
  std::vector<Scalar> max, label_z, label_gradients, grads;
  std::vector<double> sum_exp;

  PartsCase(std::vector<int64_t> ends, const LogitTransform& logit_transform, std::mt19937& random)
      : bounds(std::move(ends)),
        transform(logit_transform),
        logits(random_elements<T>(R * V, 3.0, random)),
        labels(R),
        max(R),
        label_z(R),
        label_gradients(R),
        grads(R, Scalar(0.75)),
        sum_exp(R) {
    context = std::string("in parts: ") + Named<T>::name + ", V = " + std::to_string(V);
    // The first and the last label, labels on both sides of a bound, a masked row, and any other
    // label.
    labels = {0, V - 1, bounds[0] - 1, bounds[0] % V, kIgnore, 3 % V, V / 2};
    for (int64_t& label : labels) label += &label != &labels[4] && label == kIgnore ? 1 : 0;
    grads[6] = Scalar(0);
    // All logits before the second part -inf; a very large logit in the last part.
    for (int64_t v = 0; v < bounds[0]; ++v) logits[index(3 * V + v)] = narrow<T>(-Scalar(INFINITY));
    logits[index(5 * V + V - 1)] = narrow<T>(Scalar(500));
  }

  // calls function(first label, length, the part's logits) in order
  template <typename Function>
  void for_each_part(const Function& function) {
    int64_t begin = 0;
    for (const int64_t end : bounds) {
      std::vector<T> part;
      for (int64_t r = 0; r < R; ++r) {
        part.insert(part.end(), logits.begin() + r * V + begin, logits.begin() + r * V + end);
      }
      function(begin, end - begin, part);
      begin = end;
    }
  }

  void forward() {
    for_each_part([&](int64_t begin, int64_t length, const std::vector<T>& part) {
      TokenLogpsArgs args{Named<T>::dtype, length,  part.data(), {0, length},   targets,
                          transform,       nullptr, max.data(),  sum_exp.data()};
      args.first_label = begin;
      args.num_labels = V;
      args.continues = begin > 0;
      args.label_z = label_z.data();
      cpu::token_logps(args, kThreads);
    });
  }
};

template <typename T>
void check_parts(std::vector<int64_t> bounds, const LogitTransform& transform,
                 std::mt19937& random) {
  using Scalar = Compute<T>;
  PartsCase<T> test(std::move(bounds), transform, random);
  constexpr int64_t R = PartsCase<T>::R;
  const int64_t V = test.V;
  std::vector<Scalar> logps(R), max(R);
  std::vector<double> sum_exp(R);
  const TokenLogpsArgs whole{Named<T>::dtype, V,         test.logits.data(), {0, V},
                             test.targets,    transform, logps.data(),       max.data(),
                             sum_exp.data()};
  cpu::token_logps(whole, kThreads);
  test.forward();
  std::vector<int64_t> positions{0, 1, 2, 3, -1, 5, 6};
  std::vector<Scalar> logps_of_parts(R, Scalar(0));
  cpu::write_logps({Named<T>::dtype, R, positions.data(), test.max.data(), test.sum_exp.data(),
                    test.label_z.data(), logps_of_parts.data()});
  const double tolerance = sizeof(Scalar) == 8 ? 1e-13 : 1e-6;
  for (size_t i = 0; i < R; ++i) {
    require(test.max[i] == max[i], "the largest of all parts", value(test.max[i]), value(max[i]));
    require(std::fabs(test.sum_exp[i] - sum_exp[i]) <= tolerance * sum_exp[i], "sum over parts",
            test.sum_exp[i], sum_exp[i]);
    const bool is_infinite = std::isinf(logps[i]);
    const double difference = value(logps_of_parts[i]) - value(logps[i]);
    require(is_infinite ? logps_of_parts[i] == logps[i]
                        : std::fabs(difference) <= 2 * tolerance * (1 + std::fabs(value(logps[i]))),
            "logps of parts", value(logps_of_parts[i]), value(logps[i]));
  }

  std::vector<T> gradient(index(R * V));
  TokenLogpsBackwardArgs backward{
      Named<T>::dtype,   V,      test.logits.data(), {0, V},         test.targets,    transform,
      test.grads.data(), {0, 1}, max.data(),         sum_exp.data(), gradient.data(), {0, V}};
  cpu::token_logps_backward(backward, kThreads);
  std::fill(test.label_gradients.begin(), test.label_gradients.end(), Scalar(77));
  test.for_each_part([&](int64_t begin, int64_t length, const std::vector<T>& part) {
    std::vector<T> of_part(part.size());
    TokenLogpsBackwardArgs args = backward;
    args.V = length;
    args.logits = part.data();
    args.logits_strides = args.dlogits_strides = {0, length};
    args.dlogits = of_part.data();
    args.first_label = begin;
    args.num_labels = V;
    args.label_gradients = test.label_gradients.data();
    cpu::token_logps_backward(args, kThreads);
    const std::vector<T> without_labels = of_part;
    cpu::put_label_gradients({Named<T>::dtype, R, length, begin, kIgnore, test.labels.data(),
                              test.label_gradients.data(), of_part.data(), length});
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t v = 0; v < length; ++v) {
        const T expected = gradient[index(r * V + begin + v)];
        const T got = of_part[index(r * length + v)];
        const bool is_label = test.labels[index(r)] == begin + v && r != 4;
        require(std::memcmp(&got, &expected, sizeof(T)) == 0, "gradient of parts", value(got),
                value(expected));
        const double without = value(without_labels[index(r * length + v)]);
        require(!is_label || without == 0.0, "the label's element is left out", without);
      }
    }
  });
  require(test.label_gradients[4] == Scalar(77), "a masked row has no label gradient");
  require(test.label_gradients[6] == Scalar(0), "no gradient in, none out");
}

// ---- the gradient of hidden states ----------------------------------------------------------

template <typename T>
void check_hidden_gradient(int64_t H, std::mt19937& random) {
  using Scalar = Compute<T>;
  constexpr int64_t B = 2, T_ = 3, V = 5;
  const std::vector<int64_t> positions{4, 0, 5, -1}, labels{4, 0, 3, kIgnore};
  const int64_t R = static_cast<int64_t>(positions.size());
  const std::vector<Scalar> label_gradients = random_elements<Scalar>(R, 1.0, random);
  const std::vector<T> first = random_elements<T>(R * H, 1.0, random);
  const std::vector<T> second = random_elements<T>(R * H, 1.0, random);
  const std::vector<T> last = random_elements<T>(R * H, 1.0, random);
  const std::vector<T> weight = random_elements<T>(V * H, 1.0, random);  // [H, V]
  std::vector<Scalar> sum(index(R * H));
  cpu::add_partial({Named<T>::dtype, R * H, first.data(), sum.data(), true}, kThreads);
  cpu::add_partial({Named<T>::dtype, R * H, second.data(), sum.data(), false}, kThreads);
  for (const bool has_sum : {false, true}) {
    std::vector<T> dhidden(index(B * T_ * H), narrow<T>(Scalar(7)));
    cpu::hidden_gradient(
        {Named<T>::dtype, T_, H, R, V, positions.data(), labels.data(), label_gradients.data(),
         weight.data(), 1, V, last.data(), has_sum ? sum.data() : nullptr, dhidden.data()},
        kThreads);
    std::vector<double> expected(dhidden.size(), 7.0);
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t h = 0; h < H; ++h) {
        const size_t at = index(i * H + h);
        const double of_sum = has_sum ? value(first[at]) + value(second[at]) : 0.0;
        expected[index(positions[index(i)] * H + h)] =
            of_sum + value(last[at]) +
            value(label_gradients[index(i)]) * value(weight[index(h * V + labels[index(i)])]);
      }
    }
    const double rounding = sizeof(T) == 8 ? 1e-15 : sizeof(T) == 4 ? 1e-6 : 4e-3;
    for (size_t i = 0; i < dhidden.size(); ++i) {
      require(std::fabs(value(dhidden[i]) - expected[i]) <= rounding * (4 + std::fabs(expected[i])),
              "dhidden", value(dhidden[i]), expected[i]);
    }
  }
}

}  // namespace

void check_token_rows() {
  std::mt19937 random(0);
  const LogitTransform plain = kTransforms[0].transform;
  // Enough rows for several threads.
  check_parts<float>({40000, 90000}, plain, random);
  check_gather_rows<float>(40000, random);
  check_hidden_gradient<BFloat16>(40000, random);
  if (kThreadsAlone) return;
  for (const bool shift : {false, true}) {
    for (const int64_t spare_rows : {0, 1, 4}) check_select_tokens(shift, spare_rows);
  }
  for_each_dtype([&](auto element) {
    using T = decltype(element);
    for (const int64_t H : {1, 3, 64}) {
      context = std::string("rows: ") + Named<T>::name + ", H = " + std::to_string(H);
      check_gather_rows<T>(H, random);
      check_hidden_gradient<T>(H, random);
    }
    for (const NamedTransform& named : kTransforms) {
      check_parts<T>({64, 128, 131}, named.transform, random);
      check_parts<T>({4, 5}, named.transform, random);
    }
    // A part with several pieces.
    check_parts<T>({3, 70000}, plain, random);
  });
  context.clear();
}

}  // namespace simpo_ext::test
