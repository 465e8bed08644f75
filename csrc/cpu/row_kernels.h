// What is compiled once for each instruction set: the passes over a run of consecutive logits, a
// whole row or a part of one. Plain data and function pointers, so that nothing compiled for one
// instruction set is linked into code for another.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/loss_math.h"
#include "core/row_report.h"

namespace simpo_ext::cpu {

// sum(exp(z)) of a run as sum * exp(max); max is float's for logits of up to 32 bits.
struct RunSum {
  double max;
  double sum;
};

struct RunReport {
  RunSum sum;
  RowReport report;
};

struct RowKernels {
  // As in torch.backends.cpu.get_cpu_capability().
  const char* capability;

  // The transformed logit at x, to the bit as the passes below see it.
  double (*z)(DType dtype, LogitTransform transform, const void* x);

  // Of the transformed logits z of x[0, n): max is the largest of them and of hint, and sum that of
  // exp(z - max). hint is the z of any logit of the row: the closer to the largest, the faster.
  // All of them -inf, and hint too: max -inf, sum 0. NaN or +inf among them: sum NaN.
  // Reads x once, but for blocks of 8192 whose z are far above all before them: those twice.
  RunSum (*sum_exp)(DType dtype, LogitTransform transform, const void* x, int64_t n, double hint);

  // sum_exp to the bit, and the RowReport beside it.
  RunReport (*sum_exp_report)(DType dtype, LogitTransform transform, const void* x, int64_t n,
                              double hint);

  // Of the transformed logits of x[0, n).
  double (*sum_z)(DType dtype, LogitTransform transform, const void* x, int64_t n);

  // dx[i] = factor * exp(z_i - max) * dz_i/dx_i without the slope that all logits share, for x[0,
  // n) and a max that no z exceeds. dx may be x. Streaming writes past the caches.
  void (*scaled_exp)(DType dtype, LogitTransform transform, const void* x, int64_t n, double max,
                     double factor, void* dx, bool streaming);
};

extern const RowKernels kGenericRowKernels;
#if defined(__x86_64__)
extern const RowKernels kAvx2RowKernels;
extern const RowKernels kAvx512RowKernels;
extern const RowKernels kAvx512Bf16RowKernels;
#endif

}  // namespace simpo_ext::cpu
