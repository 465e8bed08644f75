// What the compiled library is. Needs no torch.
#pragma once

namespace simpo_ext {

// Text is of static storage.
struct BuildInfo {
  const char* version;         // as find_package's: "0.1.0"
  const char* compiler;        // "GCC 12.2.0", "Clang ..."
  const char* cpu_capability;  // what the CPU kernels run with, as in Python's cpu_capability()
  const char* torch_target;    // the oldest torch whose stable ABI it speaks: "2.10"
  const char* cuda_archs;      // comma-separated; empty: built without nvcc
  int cuda_runtime_version;    // as CUDART_VERSION; 0: built without nvcc
};

}  // namespace simpo_ext

extern "C" {

// Throws std::invalid_argument if SIMPO_CPU_CAPABILITY names none that the machine can run.
const simpo_ext::BuildInfo* simpo_ext_build_info();

// Why the library's ops cannot be used in this process; null: they can.
const char* simpo_ext_load_error();

}  // extern "C"

namespace simpo_ext {

inline BuildInfo build_info() { return *simpo_ext_build_info(); }

}  // namespace simpo_ext
