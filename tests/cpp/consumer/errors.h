// Of errors.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

// Of the batch that main.cpp reads.
void check_errors(const std::vector<at::Tensor>& batch);
