// The sections of the program, and how a check of any of them fails.
#pragma once

#include <cmath>

namespace simpo_ext::kernel_tests {

// reduced: fewer of the same cases, for builds that run ten times as slow.
void check_values(bool reduced);
void check_parts(bool reduced);
void check_report(bool reduced);
void check_token_rows(bool reduced);
void check_sequences(bool reduced);
void check_preference(bool reduced);
void check_bytes(bool reduced);
void check_schedules(bool reduced);
void check_offsets(bool reduced);
void check_vocab_shards(bool reduced);

// What is being checked from now on, for the message of a failure. As printf.
[[gnu::format(printf, 1, 2)]] void describe(const char* format, ...);

// Ends the program with a message.
[[noreturn]] void fail(const char* what, double got, double expected);

inline void require(bool condition, const char* what, double got = 0.0, double expected = 0.0) {
  if (!condition) fail(what, got, expected);
}

inline void require_equal(double got, double expected, const char* what) {
  require(got == expected, what, got, expected);
}

// NaN is close to NaN alone, and an infinity to itself.
inline bool is_close(double got, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::fabs(got - expected) <= tolerance;
}

inline void require_close(double got, double expected, double tolerance, const char* what) {
  require(is_close(got, expected, tolerance), what, got, expected);
}

}  // namespace simpo_ext::kernel_tests
