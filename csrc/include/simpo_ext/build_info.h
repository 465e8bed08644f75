// Facts about the compiled library. Needs no torch.
#pragma once

namespace simpo_ext {

// The strings have static storage.
struct BuildInfo {
  const char* version;         // the one that find_package sees: "0.1.0"
  const char* compiler;        // "GCC 12.2.0", "Clang ..."
  const char* cpu_capability;  // the instruction set of the CPU kernels, as in Python
  const char* torch_target;    // the oldest torch that it works with: "2.10"
  const char* cuda_archs;      // comma-separated; empty: built without nvcc
  int cuda_runtime_version;    // as CUDART_VERSION; 0: built without nvcc
};

}  // namespace simpo_ext

extern "C" {

// Throws std::invalid_argument if SIMPO_CPU_CAPABILITY is not an instruction set of this machine.
const simpo_ext::BuildInfo* simpo_ext_build_info();

// The reason why this process cannot use the library's ops; null if it can.
const char* simpo_ext_load_error();

}  // extern "C"

namespace simpo_ext {

inline BuildInfo build_info() { return *simpo_ext_build_info(); }

}  // namespace simpo_ext
