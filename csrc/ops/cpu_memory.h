// Large CPU tensors, on huge pages or in the memory of earlier calls: see cpu/pages.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "ops/tensors.h"

namespace simpo_ext::ops {

// A tensor that holds zeros if the system provides them without writing.
LargeTensor new_large_cpu_tensor(const Tensor& like, std::initializer_list<int64_t> sizes);

// A tensor that the caller writes completely.
Tensor new_large_cpu_tensor_for_writing(const Tensor& like, std::initializer_list<int64_t> sizes);

}  // namespace simpo_ext::ops
