#define SIMPO_ISA avx512_bf16

#include "cpu/simd_avx512.h"
// Uses the vectors of the header above.
#include "cpu/row_kernels.inl"

namespace simpo_ext::cpu {

constinit const RowKernels kAvx512Bf16RowKernels = make_row_kernels("AVX512_BF16");

}  // namespace simpo_ext::cpu
