// The functions that registration.cpp calls when the library is loaded.
#pragma once

#include <torch/csrc/stable/library.h>

namespace simpo_ext::ops {

using Library = torch::stable::detail::StableLibrary;

void define_ops(Library& m);
void register_cpu_ops(Library& m);
void register_cuda_ops(Library& m);

}  // namespace simpo_ext::ops
