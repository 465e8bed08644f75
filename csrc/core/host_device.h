// The attributes of functions that both the host compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define SIMPO_HOST_DEVICE __host__ __device__
#else
// Always inlined. The linker keeps one copy of an ordinary inline function for all translation
// units, and that copy may use instructions that the machine lacks.
#define SIMPO_HOST_DEVICE __attribute__((always_inline))
#endif
