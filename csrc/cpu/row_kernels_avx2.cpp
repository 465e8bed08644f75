#define SIMPO_ISA avx2

#include "cpu/simd_avx2.h"
// Uses the vectors of the header above.
#include "cpu/row_kernels.inl"

namespace simpo_ext::cpu {

constinit const RowKernels kAvx2RowKernels = make_row_kernels("AVX2");

}  // namespace simpo_ext::cpu
