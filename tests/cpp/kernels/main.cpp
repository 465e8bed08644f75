// The CPU kernels under a sanitizer, with no torch in sight: every buffer has exactly the size the
// contract states and starts at an odd element, rows that must not be read are poisoned, and
// threads are plain std::threads. Values are compared with a direct double computation. Exits
// non-zero on the first failure.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../poison.h"
#include "core/kernels.h"
#include "cpu/fast_exp.h"

using namespace simpo_ext;

namespace {

void require(bool condition, const char* what, double got = 0.0, double expected = 0.0) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (got %.17g, expected %.17g)\n", what, got, expected);
  std::exit(1);
}

// Three threads, so that a range is cut at odd places.
constexpr ParallelFor kThreads{
    [](int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body, void* context) {
      const int64_t step = std::max(grain, (end - begin + 2) / 3);
      std::vector<std::thread> threads;
      for (int64_t b = begin; b < end; b += step) {
        threads.emplace_back([=] { body(b, std::min(b + step, end), context); });
      }
      for (std::thread& thread : threads) thread.join();
    }};

// ---- conversions: all 65536 halves, and every rounding boundary between neighbours ----------

template <typename Narrow, typename Widen>
void check_narrowing(const char* what, uint32_t infinity_bits, Narrow to_bits, Widen to_float) {
  const auto expect = [&](float value, uint32_t bits) {
    require(to_bits(value) == bits, what, to_bits(value), bits);
    require(to_bits(-value) == (bits | 0x8000u), what, to_bits(-value), bits | 0x8000u);
  };
  for (uint32_t bits = 0; bits < infinity_bits; ++bits) {
    const double low = to_float(bits);
    // Where infinity stands, the next value of the grid, had the format one, is what rounding sees.
    const double high =
        bits + 1 < infinity_bits ? to_float(bits + 1) : low + (low - to_float(bits - 1));
    const double middle = (low + high) / 2;
    expect(static_cast<float>(low), bits);
    // Between the least of bfloat16's subnormals float has no middle.
    if (static_cast<double>(static_cast<float>(middle)) != middle) continue;
    const float half_way = static_cast<float>(middle);
    expect(half_way, bits + (bits & 1u));  // ties to even
    expect(std::nextafter(half_way, -1.0f), bits);
    expect(std::nextafter(half_way, std::numeric_limits<float>::infinity()), bits + 1);
  }
  expect(std::numeric_limits<float>::infinity(), infinity_bits);
  const uint32_t nan = to_bits(std::numeric_limits<float>::quiet_NaN()) & 0x7fffu;
  require(nan > infinity_bits, what, nan);
}

void check_conversions() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    const float got = widen(Float16{static_cast<uint16_t>(bits)});
    double expected = exponent == 0 ? std::ldexp(mantissa, -24)
                      : exponent == 31
                          ? (mantissa ? NAN : INFINITY)
                          : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
    if (bits & 0x8000u) expected = -expected;
    const bool same = std::isnan(expected) ? std::isnan(got) : got == static_cast<float>(expected);
    require(same && std::signbit(got) == ((bits & 0x8000u) != 0), "widen half", got, expected);
  }
  check_narrowing(
      "narrow half", 0x7c00u, [](float f) -> uint32_t { return narrow<Float16>(f).bits; },
      [](uint32_t b) { return widen(Float16{static_cast<uint16_t>(b)}); });
  check_narrowing(
      "narrow bfloat16", 0x7f80u, [](float f) -> uint32_t { return narrow<BFloat16>(f).bits; },
      [](uint32_t b) { return widen(BFloat16{static_cast<uint16_t>(b)}); });
}

// ---- token_logps ----------------------------------------------------------------------------

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::kFloat16;
};

template <typename T>
void check_token_logps(int64_t V, bool shift, std::mt19937& random) {
  using Scalar = Compute<T>;
  constexpr int64_t B = 3, T_ = 5, kIgnore = -100;
  const TokenStrides strides{T_ * V, V};
  // One element in front, so that no row is aligned to more than its element.
  std::vector<T> memory(static_cast<size_t>(1 + B * T_ * V));
  std::normal_distribution<double> normal(0.0, 3.0);
  for (T& x : memory) x = narrow<T>(static_cast<Scalar>(normal(random)));
  T* logits = memory.data() + 1;
  std::vector<int64_t> labels(static_cast<size_t>(B * T_));
  for (int64_t i = 0; i < B * T_; ++i) {
    labels[static_cast<size_t>(i)] = i % 3 == 1 ? kIgnore : static_cast<int64_t>(random() % V);
  }
  const Targets targets{labels.data(), {T_, 1}, B, T_, kIgnore, shift};
  std::vector<Scalar> logps(B * T_), grad(B * T_);
  std::vector<Scalar> max(B * T_);
  std::vector<double> sum_exp(B * T_);
  for (size_t i = 0; i < grad.size(); ++i)
    grad[i] = i % 4 == 2 ? Scalar(0) : Scalar(0.25) * Scalar(i + 1);

  const auto for_each_row = [&](const auto& function) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < T_; ++t) function(b, t, logits + strides.offset(b, t), b * T_ + t);
    }
  };
  const size_t row_bytes = static_cast<size_t>(V) * sizeof(T);
  // Poison is kept per 8 bytes, so a row's own bytes alone are poisoned when a neighbour shares the
  // granule.
  for_each_row([&](int64_t b, int64_t t, T* x, int64_t) {
    if (!targets.is_valid(b, t)) POISON(x, row_bytes);
  });
  for_each_row([&](int64_t b, int64_t t, T* x, int64_t) {
    if (targets.is_valid(b, t)) UNPOISON(x, row_bytes);
  });
  const TokenLogpsArgs args{DTypeOf<T>::value, V,          logits,
                            strides,           targets,    {1.0, 0.0},
                            logps.data(),      max.data(), sum_exp.data()};
  require(!cpu::token_logps(args, kThreads).found(), "labels are in range");
  for_each_row([&](int64_t, int64_t, T* x, int64_t) { UNPOISON(x, row_bytes); });

  const double tolerance = sizeof(Scalar) == 8 ? 1e-13 : 2e-6;
  std::vector<double> expected_lse(sum_exp.size());
  for_each_row([&](int64_t b, int64_t t, const T* x, int64_t row) {
    const size_t i = static_cast<size_t>(row);
    double sum = 0.0;
    for (int64_t v = 0; v < V; ++v) sum += std::exp(static_cast<double>(widen(x[v])));
    expected_lse[i] = targets.is_valid(b, t) ? std::log(sum) : 0.0;
    const double expected = targets.is_valid(b, t)
                                ? static_cast<double>(widen(x[targets.at(b, t)])) - std::log(sum)
                                : 0.0;
    require(std::fabs(static_cast<double>(logps[i]) - expected) <= tolerance, "logps",
            static_cast<double>(logps[i]), expected);
    const double lse =
        targets.is_valid(b, t) ? static_cast<double>(max[i]) + std::log(sum_exp[i]) : 0.0;
    require(std::fabs(lse - expected_lse[i]) <= tolerance, "max and sum_exp", lse, expected_lse[i]);
  });

  std::vector<T> out_memory(memory.size());
  T* dlogits = out_memory.data() + 1;
  const auto needs_reading = [&](int64_t b, int64_t t, int64_t row) {
    return targets.is_valid(b, t) && grad[static_cast<size_t>(row)] != Scalar(0);
  };
  for_each_row([&](int64_t b, int64_t t, T* x, int64_t row) {
    if (!needs_reading(b, t, row)) POISON(x, row_bytes);
  });
  for_each_row([&](int64_t b, int64_t t, T* x, int64_t row) {
    if (needs_reading(b, t, row)) UNPOISON(x, row_bytes);
  });
  TokenLogpsBackwardArgs backward{
      DTypeOf<T>::value, V,       logits,     strides,        targets, {1.0, 0.0},
      grad.data(),       {T_, 1}, max.data(), sum_exp.data(), dlogits, strides};
  require(!cpu::token_logps_backward(backward, kThreads).found(), "labels are in range");
  for_each_row([&](int64_t, int64_t, T* x, int64_t) { UNPOISON(x, row_bytes); });

  const double rounding = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 1e-5 : 4e-3 * 4;
  for_each_row([&](int64_t b, int64_t t, const T* x, int64_t row) {
    const T* dx = dlogits + strides.offset(b, t);
    for (int64_t v = 0; v < V; ++v) {
      double expected = 0.0;
      if (needs_reading(b, t, row)) {
        const double p =
            std::exp(static_cast<double>(widen(x[v])) - expected_lse[static_cast<size_t>(row)]);
        expected =
            static_cast<double>(grad[static_cast<size_t>(row)]) * ((v == targets.at(b, t)) - p);
      }
      const double got = static_cast<double>(widen(dx[v]));
      require(std::fabs(got - expected) <= rounding, "dlogits", got, expected);
      if (expected == 0.0) require(got == 0.0, "a row without gradient is exactly 0", got);
    }
  });

  backward.dlogits = logits;
  cpu::token_logps_backward(backward, kThreads);
  require(std::memcmp(logits, dlogits, row_bytes * B * T_) == 0, "in place gives the same bits");

  for (const int64_t bad : {V, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    labels[8] = bad;
    const LabelError error = cpu::token_logps(args, kThreads);
    require(error.b == 1 && error.position == 3 && error.label == bad, "the bad label is found");
  }
}

// ---- preference_loss ------------------------------------------------------------------------

void check_preference_loss(int64_t P, int64_t T_) {
  std::vector<float> token_logps(static_cast<size_t>(2 * P * T_));
  std::vector<int64_t> labels(token_logps.size());
  for (size_t i = 0; i < labels.size(); ++i) {
    token_logps[i] = -0.25f * static_cast<float>(i % 7);
    labels[i] = i % 5 == 0 ? -100 : 1;
  }
  const Targets targets{labels.data(), {T_, 1}, 2 * P, T_, -100, true};
  const size_t pairs = static_cast<size_t>(P);
  std::vector<float> losses(pairs), logps(2 * pairs), rewards(2 * pairs), slopes(pairs);
  std::vector<double> metrics(kNumMetrics), sums(2 * pairs);
  std::vector<int64_t> counts(2 * pairs);
  float loss = 0.0f, sft_loss = 0.0f;
  const LossReduction reduction{Reduction::kMean, SftReduction::kToken, EmptyPolicy::kDrop, 0.5};
  cpu::preference_loss({DType::kFloat32,
                        token_logps.data(),
                        {T_, 1},
                        targets,
                        true,
                        {LossType::kSigmoid, 2.0, 0.5, 0.1},
                        reduction,
                        sums.data(),
                        &loss,
                        losses.data(),
                        logps.data(),
                        rewards.data(),
                        &sft_loss,
                        metrics.data(),
                        slopes.data(),
                        counts.data()},
                       kThreads);
  require(std::isfinite(loss) && std::isfinite(sft_loss), "the loss is finite", loss);
  require(metrics[kNumPairs] + metrics[kDroppedPairs] == static_cast<double>(P),
          "every pair is counted");
  std::vector<float> grad(token_logps.size());
  const float one = 1.0f;
  cpu::preference_loss_backward(
      {DType::kFloat32, targets, true, reduction, slopes.data(), counts.data(), &one, 0,
       losses.data(), 1, nullptr, 0, nullptr, 0, grad.data()},
      kThreads);
  for (int64_t b = 0; b < 2 * P; ++b) {
    for (int64_t t = 0; t < T_; ++t) {
      const float g = grad[static_cast<size_t>(b * T_ + t)];
      require(targets.is_valid(b, t) ? std::isfinite(g) : g == 0.0f,
              "gradients stand at valid tokens", g);
    }
  }
}

void check_sequence_logps() {
  constexpr int64_t B = 3, T_ = 4;
  std::vector<double> token_logps(B * T_), logps(B), gradient(B * T_);
  std::vector<int64_t> labels(B * T_, 1), counts(B);
  for (size_t i = 0; i < token_logps.size(); ++i) token_logps[i] = -static_cast<double>(i);
  for (size_t t = 0; t < T_; ++t) labels[t] = -100;  // the first sequence is empty
  labels[6] = -100;
  const Targets targets{labels.data(), {T_, 1}, B, T_, -100, false};
  cpu::sequence_logps(
      {DType::kFloat64, token_logps.data(), {T_, 1}, targets, true, logps.data(), counts.data()},
      kThreads);
  require(std::isnan(logps[0]) && counts[0] == 0, "an empty sequence is NaN");
  require(logps[1] == -(4.0 + 5.0 + 7.0) / 3 && counts[1] == 3, "mean of the valid tokens",
          logps[1]);
  require(logps[2] == -9.5 && counts[2] == 4, "mean of all tokens", logps[2]);
  const std::vector<double> upstream{1.0, 3.0, 8.0};
  cpu::sequence_logps_backward(
      {DType::kFloat64, targets, true, upstream.data(), 1, counts.data(), gradient.data()},
      kThreads);
  const std::vector<double> expected{0, 0, 0, 0, 1, 1, 0, 1, 2, 2, 2, 2};
  for (size_t i = 0; i < expected.size(); ++i) {
    require(std::fabs(gradient[i] - expected[i]) < 1e-15, "gradient of a mean", gradient[i],
            expected[i]);
  }
}

// Every float in [-87, 88] at a stride, and the edges.
void check_fast_exp() {
  for (float x = -87.0f; x <= 88.0f; x += 3.1e-5f) {
    const double expected = std::exp(static_cast<double>(x));
    const double error = std::fabs(static_cast<double>(cpu::fast_exp(x)) - expected) / expected;
    require(error < 9e-8, "fast_exp", static_cast<double>(x), error);
  }
  require(cpu::fast_exp(0.0f) == 1.0f, "exp(0) is 1");
  require(cpu::fast_exp(-INFINITY) == 0.0f && cpu::fast_exp(-1e30f) == 0.0f,
          "exp of far below is 0");
  require(std::isnan(cpu::fast_exp(NAN)), "exp(NaN) is NaN");
}

}  // namespace

int main() {
  check_conversions();
  check_fast_exp();
  check_sequence_logps();
  std::mt19937 random(0);
  // 1; less than a vector; a block of 1024 less one, exactly, and more; enough for several threads.
  for (const int64_t V : {1, 3, 1023, 1024, 1025, 20000}) {
    for (const bool shift : {false, true}) {
      check_token_logps<double>(V, shift, random);
      check_token_logps<float>(V, shift, random);
      check_token_logps<BFloat16>(V, shift, random);
      check_token_logps<Float16>(V, shift, random);
    }
  }
  check_preference_loss(0, 4);
  check_preference_loss(5, 1);
  check_preference_loss(3, 40);
  check_preference_loss(40, 9000);
  std::puts("ok");
  return 0;
}
