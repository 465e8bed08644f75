#include "ops/build_info.h"

#include "core/kernels.h"
#include "cpu/capability.h"

#ifdef SIMPO_WITH_CUDA
#include "cuda/device.h"
#endif

namespace simpo_ext {

BuildInfo build_info() {
  BuildInfo info{
      .version = SIMPO_VERSION,
#if defined(__clang__)
      .compiler = "Clang " __clang_version__,
#else
      .compiler = "GCC " __VERSION__,
#endif
      .cpu_capability = cpu::capability(),
      .cpu_capabilities = cpu::capabilities(),
      .torch_target = SIMPO_TORCH_TARGET,
      .cuda_archs = SIMPO_CUDA_ARCHS,
      .cuda_runtime_version = 0,
  };
#ifdef SIMPO_WITH_CUDA
  info.cuda_runtime_version = cuda::runtime_version();
#endif
  return info;
}

int cuda_device_count() {
#ifdef SIMPO_WITH_CUDA
  return cuda::device_count();
#else
  return 0;
#endif
}

}  // namespace simpo_ext
