// The CPU kernels under a sanitizer, with no torch in sight: every buffer has exactly the size the
// contract states and starts at an odd element, what must not be read or written is poisoned, and
// threads are plain std::threads. Values are compared with a direct double computation. Prints
// the instruction set of the row kernels; exits non-zero on the first failure.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "check.h"
#include "core/kernels.h"
#include "threads.h"

using namespace simpo_ext;
using namespace simpo_ext::test;

namespace {

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

}  // namespace

int main() {
  std::puts(cpu::capability());
  if (!kThreadsAlone) {
    check_conversions();
    check_sequence_logps();
    check_pages();
    check_row_sums();
    check_row_reports();
    check_row_gradients();
  }
  check_token_logps();
  check_token_rows();
  check_vocab_shards();
  check_preference_loss(0, 4);
  check_preference_loss(5, 1);
  check_preference_loss(3, 40);
  check_preference_loss(40, 9000);
  std::puts("ok");
  return 0;
}
