// The sections of the program, and the functions for their checks.
#pragma once

#include <cmath>

namespace simpo_ext::kernel_tests {

// reduced: fewer of the same cases, for builds that are ten times slower.
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

// Sets the name of the current case, for the message of a failure. Arguments like printf.
[[gnu::format(printf, 1, 2)]] void describe(const char* format, ...);

// Ends the program with a message.
[[noreturn]] void fail(const char* what, double got, double expected);

inline void require(bool condition, const char* what, double got = 0.0, double expected = 0.0) {
  if (!condition) fail(what, got, expected);
}

inline void require_equal(double got, double expected, const char* what) {
  require(got == expected, what, got, expected);
}

// NaN is close only to NaN, and an infinity only to itself.
inline bool is_close(double got, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(got);
  return got == expected || std::fabs(got - expected) <= tolerance;
}

inline void require_close(double got, double expected, double tolerance, const char* what) {
  require(is_close(got, expected, tolerance), what, got, expected);
}

}  // namespace simpo_ext::kernel_tests
