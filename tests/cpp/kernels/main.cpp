// The CPU kernels without torch, under a sanitizer. Every buffer has exactly the size that the
// contract states and starts at an odd element. Memory that must not be read or written is
// poisoned, and threads are std::threads. Values are compared with a direct computation in double.
// Prints the instruction set of the row kernels, and exits with 1 at the first failed check.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "check.h"
#include "core/kernels.h"

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
    // For rounding, infinity stands for the next value that the format would have.
    const double high =
        bits + 1 < infinity_bits ? to_float(bits + 1) : low + (low - to_float(bits - 1));
    const double middle = (low + high) / 2;
    expect(static_cast<float>(low), bits);
    // float has no number halfway between the least subnormals of bfloat16.
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

}  // namespace

int main() {
  std::puts(cpu::capability());
  if (!kThreadsAlone) {
    check_conversions();
    check_pages();
    check_row_sums();
    check_row_reports();
    check_row_gradients();
  }
  check_token_logps();
  check_token_rows();
  check_vocab_shards();
  check_pairs();
  std::puts("ok");
  return 0;
}
