// A stand-in for the CUDA runtime, with the functions that csrc/cuda calls. A launch calls a
// function of the test, which executes the kernel.
//
// The first call of a process that chooses a device or launches a kernel also initializes the
// runtime or loads code. In a thread that captures a CUDA graph, this is an error unless the
// thread's capture mode is relaxed. The stand-in reports this error in every thread, and tells the
// test of every such call.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

using Launch = int (*)(const char* kernel, const unsigned* grid, const unsigned* block,
                       void** arguments);
using Observe = void (*)(const char* function, int capture_mode);

constexpr int kNumDevices = 2;

Launch launch = nullptr;
Observe observe = nullptr;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local int current_device = 0;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

// For calls that may initialize the runtime or load code.
cudaError_t require_relaxed_mode(const char* function) {
  if (observe != nullptr) observe(function, static_cast<int>(capture_mode));
  return capture_mode == cudaStreamCaptureModeRelaxed ? cudaSuccess
                                                      : cudaErrorStreamCaptureUnsupported;
}

}  // namespace

extern "C" {

// ---- what the test calls

void set_callbacks(Launch execute, Observe note) {
  launch = execute;
  observe = note;
}

int current_capture_mode() { return static_cast<int>(capture_mode); }

// ---- kernels

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = device;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  const cudaError_t error = require_relaxed_mode(__func__);
  if (error != cudaSuccess) return error;
  const auto found = kernels().find(function);
  if (found == kernels().end() || launch == nullptr) return cudaErrorInvalidDeviceFunction;
  if (config->dynamicSmemBytes != 0 || config->numAttrs != 0) return cudaErrorNotSupported;
  const unsigned grid[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned block[3] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  return static_cast<cudaError_t>(launch(found->second.c_str(), grid, block, arguments));
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const cudaStreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

// nvcc's code for <<<>>> refers to these. The project does not use <<<>>>.
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaPopCallConfiguration(void*, void*, void*, void*) { return cudaErrorNotSupported; }

// ---- devices

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return require_relaxed_mode(__func__);
}

cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = require_relaxed_mode(__func__);
  if (error != cudaSuccess) return error;
  if (device < 0 || device >= kNumDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kNumDevices;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNotSupported; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }

}  // extern "C"
