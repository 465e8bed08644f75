// The instruction set of the row kernels. It is chosen once: the best that the machine has, or the
// one that the environment variable SIMPO_CPU_CAPABILITY names.
#pragma once

#include <string>
#include <vector>

#include "cpu/row_kernels.h"

namespace simpo_ext::cpu {

// The instruction sets that were built and that this machine can run, the least capable first.
std::vector<std::string> capabilities();

// Throws std::invalid_argument if the environment variable is set to anything else.
const RowKernels& row_kernels();

}  // namespace simpo_ext::cpu
