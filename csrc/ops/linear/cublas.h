// Products that cuBLAS adds to a sum in the sum's own dtype: sum += a b, where a and b are bfloat16
// or float16 and the sum is float32.
//
// Torch has an op for this, aten::addmm.dtype_out, whose alpha and beta are Scalars. Torch's stable
// ABI has no representation for a Scalar, so this library cannot call the op. It calls cublasGemmEx
// instead, as the op does, with the handle that torch's stable ABI hands out. The handle carries
// torch's stream, its workspace, and its choice whether float32 products may use TF32.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "ops/checks.h"
#include "ops/tensors.h"

namespace simpo_ext::ops::cublas {

// The values of cublas_api.h and library_types.h, which cuBLAS's binary interface fixes.
enum Operation : int { kNormal = 0, kTransposed = 1 };
enum DataType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 14 };
enum ComputeType : int { kComputeFloat32 = 68, kComputeFloat64 = 70 };
constexpr int kDefaultAlgorithm = -1;

// cublasGemmEx: C = alpha op(A) op(B) + beta C. Matrices are stored by columns, which lie lda, ldb
// and ldc elements apart: op(A) is [m, k], op(B) [k, n], C [m, n]. If beta is 0, C is not read.
using GemmEx = int (*)(void* handle, int operation_a, int operation_b, int m, int n, int k,
                       const void* alpha, const void* A, int type_a, int lda, const void* B,
                       int type_b, int ldb, const void* beta, void* C, int type_c, int ldc,
                       int compute_type, int algorithm);

inline DataType data_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return kFloat64;
    case DType::kFloat32:
      return kFloat32;
    case DType::kBFloat16:
      return kBFloat16;
    case DType::kFloat16:
      return kFloat16;
  }
  return kFloat32;  // not reached
}

inline int int_of(int64_t size) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int>::max(),
                  "matrix product: expected sizes and strides of at most ",
                  std::numeric_limits<int>::max(), ", got ", size);
  return static_cast<int>(size);
}

// b [V, H] stored by columns, as cublasGemmEx takes it.
struct ByColumns {
  Tensor tensor;
  Operation operation;
  int64_t stride;

  // Reads b in place where one of its dimensions is contiguous, and copies it otherwise.
  explicit ByColumns(const Tensor& b) : tensor(b), operation(kNormal), stride(b.stride(0)) {
    const int64_t V = b.size(0), H = b.size(1);
    if (b.stride(1) == 1 && b.stride(0) >= H) return;
    if (b.stride(0) == 1 && b.stride(1) >= V) {
      operation = kTransposed;
      stride = b.stride(1);
      return;
    }
    tensor = as_contiguous(b);
    stride = H;
  }
};

// sum [R, H] += a [R, V] b [V, H]; the first product is assigned. sum is contiguous and has the
// compute dtype; the rows of a are contiguous; b may have any strides.
inline void add_product(GemmEx gemm, void* handle, const Tensor& sum, const Tensor& a,
                        const Tensor& b, bool is_first) {
  const int64_t R = a.size(0), V = a.size(1), H = b.size(1);
  if (R * H == 0) return;
  const DType dtype = dtype_of(a, "a");
  const bool is_float64 = dtype == DType::kFloat64;
  const DataType type = data_type_of(dtype), sum_type = is_float64 ? kFloat64 : kFloat32;
  const double factors64[] = {1.0, is_first ? 0.0 : 1.0};
  const float factors32[] = {1.0F, is_first ? 0.0F : 1.0F};
  const void* alpha = is_float64 ? static_cast<const void*>(&factors64[0]) : &factors32[0];
  const void* beta = is_float64 ? static_cast<const void*>(&factors64[1]) : &factors32[1];
  // A matrix stored by rows is its transpose stored by columns: sum^T = b^T a^T.
  const ByColumns b_columns(b);
  const int status =
      gemm(handle, b_columns.operation, kNormal, int_of(H), int_of(R), int_of(V), alpha,
           b_columns.tensor.const_data_ptr(), type, int_of(b_columns.stride), a.const_data_ptr(),
           type, int_of(a.stride(0)), beta, sum.mutable_data_ptr(), sum_type, int_of(H),
           is_float64 ? kComputeFloat64 : kComputeFloat32, kDefaultAlgorithm);
  STD_TORCH_CHECK(status == 0, "cublasGemmEx failed with cublasStatus_t ", status);
}

}  // namespace simpo_ext::ops::cublas
