// Functions of the library for the Python module only. C++ programs have those of
// simpo_ext/build_info.h.
#pragma once

#include <string>
#include <vector>

#include "simpo_ext/build_info.h"

namespace simpo_ext {

// The instruction sets that the CPU kernels can use on this machine, the least capable first.
__attribute__((visibility("default"))) std::vector<std::string> cpu_capabilities();

// The number of devices that the CUDA runtime in this binary sees, or minus a cudaError_t. 0 if the
// binary has no CUDA runtime.
__attribute__((visibility("default"))) int cuda_device_count();

}  // namespace simpo_ext
