// Which instruction set the CPU kernels were compiled for.

#include "core/kernels.h"

namespace simpo_ext::cpu {

const char* capability() { return "DEFAULT"; }

}  // namespace simpo_ext::cpu
