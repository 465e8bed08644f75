// What this binary is. The one C++ interface between the op library and the Python module.
#pragma once

#include <string>
#include <vector>

namespace simpo_ext {

struct BuildInfo {
  std::string version;
  std::string compiler;
  std::string cpu_capability;  // what the CPU kernels run with
  // What they could run with on this machine, the least capable first.
  std::vector<std::string> cpu_capabilities;
  std::string torch_target;  // the oldest torch whose stable ABI this binary speaks
  std::string cuda_archs;    // comma-separated; empty: built without nvcc
  int cuda_runtime_version;  // as CUDART_VERSION; 0: built without nvcc
};

// Throws std::invalid_argument if the environment names a capability that is none of them.
__attribute__((visibility("default"))) BuildInfo build_info();

// Devices that the CUDA runtime inside this binary sees: at least 0, or minus a cudaError_t. 0 if
// the binary has no CUDA runtime.
__attribute__((visibility("default"))) int cuda_device_count();

}  // namespace simpo_ext
