#define SIMPO_ISA avx512

#include "cpu/simd_avx512.h"
// Uses the vectors of the header above.
#include "cpu/row_kernels.inl"

namespace simpo_ext::cpu {

constinit const RowKernels kAvx512RowKernels = make_row_kernels("AVX512");

}  // namespace simpo_ext::cpu
