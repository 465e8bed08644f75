// The CUDA runtime that is linked into this binary, as the host code sees it.
#pragma once

namespace simpo_ext::cuda {

// CUDART_VERSION: 1000 * major + 10 * minor.
int runtime_version();

// Devices this runtime can use with the installed driver: at least 0, or minus a cudaError_t.
int device_count();

}  // namespace simpo_ext::cuda
