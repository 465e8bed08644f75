#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace simpo_ext::cuda {

int runtime_version() { return CUDART_VERSION; }

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -static_cast<int>(error);
}

}  // namespace simpo_ext::cuda
