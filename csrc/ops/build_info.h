// What the Python module asks the library besides what C++ programs do.
#pragma once

#include <string>
#include <vector>

#include "simpo_ext/build_info.h"

namespace simpo_ext {

// What the CPU kernels could run with on this machine, the least capable first.
__attribute__((visibility("default"))) std::vector<std::string> cpu_capabilities();

// Devices that the CUDA runtime inside this binary sees: at least 0, or minus a cudaError_t. 0 if
// the binary has no CUDA runtime.
__attribute__((visibility("default"))) int cuda_device_count();

}  // namespace simpo_ext
