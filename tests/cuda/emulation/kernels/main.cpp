// The CUDA kernels, run by the emulator, against a direct computation in double or the CPU kernels:
//
//   kernels [--reduced] [section ...]
//
// runs the sections named, or all. Prints ok; exits non-zero on the first failure.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {
namespace {

struct Section {
  const char* name;
  void (*check)(bool reduced);
};
constexpr Section kSections[] = {
    {"values", check_values},       {"parts", check_parts},
    {"report", check_report},       {"token_rows", check_token_rows},
    {"sequences", check_sequences}, {"preference", check_preference},
    {"bytes", check_bytes},         {"schedules", check_schedules},
    {"offsets", check_offsets},     {"vocab_shards", check_vocab_shards}};

char description[512] = "";

}  // namespace

void describe(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(description, sizeof(description), format, arguments);
  va_end(arguments);
}

void fail(const char* what, double got, double expected) {
  std::fprintf(stderr, "failed: %s: got %.17g, expected %.17g; %s\n", what, got, expected,
               description);
  std::exit(1);
}

}  // namespace simpo_ext::kernel_tests

int main(int argc, char** argv) {
  using namespace simpo_ext::kernel_tests;
  bool reduced = false;
  std::vector<Section> chosen;
  for (int i = 1; i < argc; ++i) {
    const size_t before = chosen.size();
    for (const Section& section : kSections) {
      if (std::strcmp(argv[i], section.name) == 0) chosen.push_back(section);
    }
    if (std::strcmp(argv[i], "--reduced") == 0) {
      reduced = true;
    } else if (chosen.size() == before) {
      std::fprintf(stderr, "no section is called '%s'\n", argv[i]);
      return 2;
    }
  }
  if (chosen.empty()) chosen.assign(std::begin(kSections), std::end(kSections));
  for (const Section& section : chosen) section.check(reduced);
  std::puts("ok");
  return 0;
}
