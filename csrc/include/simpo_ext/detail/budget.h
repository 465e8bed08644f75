// The default of LinearOptions::logits_budget_bytes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace simpo_ext {

// On a GPU, the budget is the GPU's memory divided by this.
constexpr int64_t kDefaultLogitsBudgetShare = 16;
// On other devices, the budget is this many bytes.
constexpr int64_t kDefaultLogitsBudgetBytes = int64_t{1} << 30;

namespace detail {

// The bytes of memory that the GPU has.
inline int64_t gpu_memory(at::DeviceIndex index) {
  // The driver is asked once for each GPU. A device index is an int8_t.
  static std::array<std::atomic<int64_t>, 128> known{};
  std::atomic<int64_t>& memory = known.at(index);
  if (memory == 0) {
    memory = static_cast<int64_t>(c10::getDeviceAllocator(at::kCUDA)->getMemoryInfo(index).second);
  }
  return memory;
}

}  // namespace detail

// The default of LinearOptions::logits_budget_bytes for hidden states on this device. A GPU must
// have an index.
inline int64_t default_logits_budget_bytes(at::Device device) {
  return device.is_cuda() ? detail::gpu_memory(device.index()) / kDefaultLogitsBudgetShare
                          : kDefaultLogitsBudgetBytes;
}

}  // namespace simpo_ext
