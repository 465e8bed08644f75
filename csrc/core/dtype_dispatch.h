// From a DType known at run time to a type known at compile time.
#pragma once

#include "core/dtypes.h"

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

// The same for tensors of the compute dtype: float or double.
template <typename Function>
void dispatch_compute_dtype(DType dtype, const Function& function) {
  if (dtype == DType::kFloat64) {
    function(TypeTag<double>{});
  } else {
    function(TypeTag<float>{});
  }
}

}  // namespace simpo_ext
