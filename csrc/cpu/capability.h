// Which instruction set the row kernels run with: chosen once, by what the machine has, or lower if
// the environment variable SIMPO_CPU_CAPABILITY says so.
#pragma once

#include <string>
#include <vector>

#include "cpu/row_kernels.h"

namespace simpo_ext::cpu {

// Those that were built and that this machine can run, the least capable first.
std::vector<std::string> capabilities();

// Throws std::invalid_argument if the environment variable names none of them.
const RowKernels& row_kernels();

}  // namespace simpo_ext::cpu
