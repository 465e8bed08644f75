// The ops on CUDA tensors. A build without nvcc registers ops that refuse CUDA tensors.

#include "ops/implementations.h"
#include "ops/registration.h"

#ifdef SIMPO_WITH_CUDA
#include "ops/cuda_device.h"
#else
#include "ops/no_cuda_device.h"
#endif

namespace simpo_ext::ops {

void register_cuda_ops(Library& m) { register_ops<Cuda>(m); }

}  // namespace simpo_ext::ops
