// The checks of errors.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

// batch: the tensors that main.cpp reads.
void check_errors(const std::vector<at::Tensor>& batch);
