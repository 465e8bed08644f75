#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/platform.h"

namespace simpo_ext::cuda {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -static_cast<int>(error);
}

int use_device(int index) {
  const CaptureModeRelaxed relaxed;
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) return static_cast<int>(error);
  return current == index ? 0 : static_cast<int>(cudaSetDevice(index));
}

int compute_capability() {
  int device = 0, major = 0, minor = 0;
  const bool is_known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return is_known ? 10 * major + minor : 0;
}

bool is_unsupported_architecture(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
}

bool is_insufficient_driver(int error) {
  return error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion;
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace simpo_ext::cuda
