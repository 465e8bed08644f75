// The passes over a run of consecutive logits, a whole row or a piece of one. They are compiled
// once for each instruction set. The interface is plain data and function pointers, so that no
// function compiled for one instruction set is linked into code for another.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/loss_math.h"
#include "core/row_report.h"

namespace simpo_ext::cpu {

// sum(exp(z)) of a run as sum * exp(max). max is a float for logits of up to 32 bits.
struct RunSum {
  double max;
  double sum;
};

struct RunReport {
  RunSum sum;
  RowReport report;
};

struct RowKernels {
  // The name, as in torch.backends.cpu.get_cpu_capability().
  const char* capability;

  // The transformed logit at x, with the same bits as in the passes below.
  double (*z)(DType dtype, LogitTransform transform, const void* x);

  // For the transformed logits z of x[0, n): max is the largest of them and of hint, and sum is
  // sum(exp(z - max)). hint is the z of any logit of the row; the closer it is to the largest, the
  // faster the pass. If all z and hint are -inf, max is -inf and sum is 0. If a z is NaN or +inf,
  // sum is NaN. Reads x once, but a block of 8192 twice if its z are far above all before them.
  RunSum (*sum_exp)(DType dtype, LogitTransform transform, const void* x, int64_t n, double hint);

  // The same bits as sum_exp, and the RowReport of the same logits.
  RunReport (*sum_exp_report)(DType dtype, LogitTransform transform, const void* x, int64_t n,
                              double hint);

  // The sum of the transformed logits of x[0, n).
  double (*sum_z)(DType dtype, LogitTransform transform, const void* x, int64_t n);

  // dx[i] = factor * exp(z_i - max) * own_slope(z_i) for x[0, n), where no z exceeds max. dx may be
  // x. Streaming stores bypass the caches.
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
