#define SIMPO_ISA generic

#include "cpu/simd_generic.h"
// Uses the vectors of the header above.
#include "cpu/row_kernels.inl"

namespace simpo_ext::cpu {

#if defined(SIMPO_NEON)
constexpr const char* kName = "NEON";
#else
constexpr const char* kName = "DEFAULT";
#endif
constinit const RowKernels kGenericRowKernels = make_row_kernels(kName);

}  // namespace simpo_ext::cpu
