#include "ops/build_info.h"

#include "core/kernels.h"
#include "cpu/capability.h"

#ifdef SIMPO_WITH_CUDA
#include "cuda/device.h"
#endif

namespace simpo_ext {
namespace {

int cuda_runtime_version() {
#ifdef SIMPO_WITH_CUDA
  return cuda::runtime_version();
#else
  return 0;
#endif
}

}  // namespace

std::vector<std::string> cpu_capabilities() { return cpu::capabilities(); }

int cuda_device_count() {
#ifdef SIMPO_WITH_CUDA
  return cuda::device_count();
#else
  return 0;
#endif
}

}  // namespace simpo_ext

extern "C" __attribute__((visibility("default"))) const simpo_ext::BuildInfo*
simpo_ext_build_info() {
  static const simpo_ext::BuildInfo info{
      .version = SIMPO_VERSION,
#if defined(__clang__)
      .compiler = "Clang " __clang_version__,
#else
      .compiler = "GCC " __VERSION__,
#endif
      .cpu_capability = simpo_ext::cpu::capability(),
      .torch_target = SIMPO_TORCH_TARGET,
      .cuda_archs = SIMPO_CUDA_ARCHS,
      .cuda_runtime_version = simpo_ext::cuda_runtime_version(),
  };
  return &info;
}
