// Queries of the CUDA runtime that is linked into this binary. Errors are cudaError_t as int, 0
// for success.
#pragma once

namespace simpo_ext::cuda {

// CUDART_VERSION: 1000 * major + 10 * minor.
int runtime_version();

// The newest CUDA that the installed driver supports, in the same form; 0 without a driver.
int driver_version();

// The number of devices that this runtime can use with the installed driver, or minus an error.
int device_count();

// Makes the device the current one of the calling thread. Torch has its own runtime, and this one
// does not know torch's current device.
int use_device(int index);

// 10 * major + minor of the current device; 0 if there is none.
int compute_capability();

// Errors that a user can fix.
bool is_unsupported_architecture(int error);
bool is_insufficient_driver(int error);

// The error's name and description, in static storage.
const char* error_name(int error);
const char* error_text(int error);

}  // namespace simpo_ext::cuda
