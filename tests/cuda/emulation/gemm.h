// cublasGemmEx on the CPU, as cuBLAS's documentation defines it: matrices by columns, alpha and
// beta of the compute type, and sums of products in that type.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <vector>

#include "ops/linear/cublas.h"

namespace simpo_ext::emulation {

// CUBLAS_STATUS_INVALID_VALUE and CUBLAS_STATUS_NOT_SUPPORTED of cublasStatus_t.
constexpr int kInvalidValue = 7, kNotSupported = 15;

template <class T, class Scalar>
void gemm_of(int operation_a, int operation_b, int m, int n, int k, Scalar alpha, const T* A,
             int lda, const T* B, int ldb, Scalar beta, Scalar* C, int ldc) {
  const auto at = [](const T* matrix, int operation, int ld, int i, int j) {
    const int row = operation == ops::cublas::kNormal ? i : j;
    const int column = operation == ops::cublas::kNormal ? j : i;
    return static_cast<Scalar>(matrix[row + static_cast<std::ptrdiff_t>(column) * ld]);
  };
  std::vector<Scalar> column(m);
  for (int j = 0; j < n; ++j) {
    column.assign(m, Scalar(0));
    for (int l = 0; l < k; ++l) {
      const Scalar b = at(B, operation_b, ldb, l, j);
      for (int i = 0; i < m; ++i) column[i] += at(A, operation_a, lda, i, l) * b;
    }
    Scalar* to = C + static_cast<std::ptrdiff_t>(j) * ldc;
    for (int i = 0; i < m; ++i) {
      to[i] = beta == Scalar(0) ? alpha * column[i] : alpha * column[i] + beta * to[i];
    }
  }
}

inline int gemm_ex(void*, int operation_a, int operation_b, int m, int n, int k, const void* alpha,
                   const void* A, int type_a, int lda, const void* B, int type_b, int ldb,
                   const void* beta, void* C, int type_c, int ldc, int compute_type,
                   int algorithm) {
  using namespace ops::cublas;
  const int rows_a = operation_a == kNormal ? m : k, rows_b = operation_b == kNormal ? k : n;
  if (m < 0 || n < 0 || k < 0 || lda < std::max(1, rows_a) || ldb < std::max(1, rows_b) ||
      ldc < std::max(1, m)) {
    return kInvalidValue;
  }
  const bool is_float64 = compute_type == kComputeFloat64;
  if (type_a != type_b || type_c != (is_float64 ? kFloat64 : kFloat32) ||
      (type_a == kFloat64) != is_float64 || (!is_float64 && compute_type != kComputeFloat32) ||
      algorithm != kDefaultAlgorithm) {
    return kNotSupported;
  }
  const auto run = [&]<class T, class Scalar>(T, Scalar) {
    gemm_of(operation_a, operation_b, m, n, k, *static_cast<const Scalar*>(alpha),
            static_cast<const T*>(A), lda, static_cast<const T*>(B), ldb,
            *static_cast<const Scalar*>(beta), static_cast<Scalar*>(C), ldc);
  };
  switch (type_a) {
    case kFloat64:
      run(double{}, double{});
      return 0;
    case kFloat32:
      run(float{}, float{});
      return 0;
    case kBFloat16:
      run(c10::BFloat16{}, float{});
      return 0;
    case kFloat16:
      run(c10::Half{}, float{});
      return 0;
    default:
      return kNotSupported;
  }
}

}  // namespace simpo_ext::emulation
