// Turns a dtype and a logit transform, known at run time, into types.
#pragma once

#include "core/dtypes.h"
#include "core/loss_math.h"

namespace simpo_ext {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<element type>{}).
template <typename Function>
void dispatch_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(TypeTag<double>{});
    case DType::kFloat32:
      return function(TypeTag<float>{});
    case DType::kBFloat16:
      return function(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return function(TypeTag<Float16>{});
  }
}

// Calls function(TypeTag<element type>{}, TypeTag<ScaledLogits or CappedLogits>{}).
template <typename Function>
void dispatch_logits(DType dtype, LogitTransform transform, const Function& function) {
  dispatch_dtype(dtype, [&](auto element) {
    using Scalar = Compute<typename decltype(element)::type>;
    if (transform.softcap == 0.0) {
      function(element, TypeTag<ScaledLogits<Scalar>>{});
    } else {
      function(element, TypeTag<CappedLogits<Scalar>>{});
    }
  });
}

// Like dispatch_dtype, for the compute dtype: calls function with float or double.
template <typename Function>
void dispatch_compute_dtype(DType dtype, const Function& function) {
  if (dtype == DType::kFloat64) {
    function(TypeTag<double>{});
  } else {
    function(TypeTag<float>{});
  }
}

}  // namespace simpo_ext
