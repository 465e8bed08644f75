// One spelling for functions that both the host compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define SIMPO_HOST_DEVICE __host__ __device__
#else
// Always inlined: of an ordinary inline function the linker keeps one copy for all translation
// units, and that one may have been compiled for instructions the machine does not have.
#define SIMPO_HOST_DEVICE __attribute__((always_inline))
#endif
