#include "cpu/capability.h"

#include <cctype>
#include <cstdlib>
#include <stdexcept>

#include "core/kernels.h"

namespace simpo_ext::cpu {
namespace {

constexpr const char* kVariable = "SIMPO_CPU_CAPABILITY";

std::vector<const RowKernels*> usable_kernels() {
  std::vector<const RowKernels*> usable = {&kGenericRowKernels};
#if defined(__x86_64__)
  // These also check that the operating system saves the registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) usable.push_back(&kAvx2RowKernels);
  if (has_avx512) usable.push_back(&kAvx512RowKernels);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
    usable.push_back(&kAvx512Bf16RowKernels);
  }
#endif
  return usable;
}

const RowKernels* choose() {
  const std::vector<const RowKernels*> usable = usable_kernels();
  const char* value = std::getenv(kVariable);
  if (value == nullptr || *value == '\0') return usable.back();
  std::string wanted = value, names;
  for (char& c : wanted) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  for (const RowKernels* kernels : usable) {
    if (wanted == kernels->capability) return kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->capability;
  }
  throw std::invalid_argument(std::string(kVariable) + ": expected one of " + names +
                              ", the instruction sets of this machine, got '" + value + "'");
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const RowKernels* kernels : usable_kernels()) names.emplace_back(kernels->capability);
  return names;
}

const RowKernels& row_kernels() {
  static const RowKernels* const kernels = choose();
  return *kernels;
}

const char* capability() { return row_kernels().capability; }

}  // namespace simpo_ext::cpu
