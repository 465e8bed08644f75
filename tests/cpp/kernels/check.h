// Shared by the tests of the CPU kernels. A failed check prints the current case and ends the
// program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../poison.h"
#include "core/dtypes.h"
#include "core/loss_math.h"

namespace simpo_ext::test {

// Code of a single thread has no races, and is slow under ThreadSanitizer.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadsAlone = true;
#else
inline constexpr bool kThreadsAlone = false;
#endif

// The name of the current case.
inline std::string context;

inline void require(bool condition, const char* what, double got = 0.0, double expected = 0.0) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (got %.17g, expected %.17g) %s\n", what, got, expected,
               context.c_str());
  std::exit(1);
}

template <typename T>
struct Named;
template <>
struct Named<double> {
  static constexpr DType dtype = DType::kFloat64;
  static constexpr const char* name = "float64";
};
template <>
struct Named<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr const char* name = "float32";
};
template <>
struct Named<BFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr const char* name = "bfloat16";
};
template <>
struct Named<Float16> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr const char* name = "float16";
};

// Calls function with a value of each element type.
template <typename Function>
void for_each_dtype(const Function& function) {
  function(double{});
  function(float{});
  function(BFloat16{});
  function(Float16{});
}

// Each form of the transform: z = x; with a scale that float does not hold exactly; with a cap and
// a scale.
struct NamedTransform {
  const char* name;
  LogitTransform transform;
};
constexpr NamedTransform kTransforms[] = {
    {"plain", {1.0, 0.0}}, {"logit_scale 0.7", {0.7, 0.0}}, {"softcap 5", {1.5, 5.0}}};

// Each is defined in the file with its name.
void check_pages();
void check_pairs();
void check_row_gradients();
void check_row_reports();
void check_row_sums();
void check_token_logps();
void check_token_rows();
void check_vocab_shards();

}  // namespace simpo_ext::test
