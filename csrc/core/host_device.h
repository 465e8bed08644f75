// One spelling for functions that both the host compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define SIMPO_HOST_DEVICE __host__ __device__
#else
#define SIMPO_HOST_DEVICE
#endif
