// The CUDA runtime that is linked into this binary, as the host code sees it. Errors are
// cudaError_t as int, 0 for success.
#pragma once

namespace simpo_ext::cuda {

// CUDART_VERSION: 1000 * major + 10 * minor.
int runtime_version();

// The newest CUDA that the installed driver supports, in the same form; 0: no driver.
int driver_version();

// Devices this runtime can use with the installed driver: at least 0, or minus an error.
int device_count();

// Makes the device the calling thread's current one, in this runtime too: torch has its own.
int use_device(int index);

// 10 * major + minor of the current device; 0 if there is none.
int compute_capability();

// What a caller can do something about, apart.
bool is_unsupported_architecture(int error);
bool is_insufficient_driver(int error);

// The error's name and description, of static storage.
const char* error_name(int error);
const char* error_text(int error);

}  // namespace simpo_ext::cuda
