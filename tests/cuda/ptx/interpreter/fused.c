// Multiply and add with one rounding, which NumPy lacks. A stride of 0 repeats a scalar.
#include <math.h>

#define DEFINE(name, type, function)                                                   \
  void name(const type* a, long stride_a, const type* b, long stride_b, const type* c, \
            long stride_c, type* out, long n) {                                        \
    for (long i = 0; i < n; ++i) {                                                     \
      out[i] = function(a[i * stride_a], b[i * stride_b], c[i * stride_c]);            \
    }                                                                                  \
  }

DEFINE(fma_f32, float, fmaf)
DEFINE(fma_f64, double, fma)
