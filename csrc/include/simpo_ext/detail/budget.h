// How much of the logits is held at a time where the caller does not say.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace simpo_ext {

// On a GPU, one part in so many of its memory; elsewhere, so many bytes.
constexpr int64_t kDefaultLogitsBudgetShare = 16;
constexpr int64_t kDefaultLogitsBudgetBytes = int64_t{1} << 30;

namespace detail {

// Bytes of memory that the GPU has; 0 if libtorch does not say. Allocator is c10's DeviceAllocator,
// whose getMemoryInfo the first libtorch that this header is for may lack.
template <class Allocator>
int64_t gpu_memory(at::DeviceIndex index) {
  if constexpr (requires(Allocator& allocator) { allocator.getMemoryInfo(index); }) {
    // The driver is asked once for each GPU. An index is an int8_t.
    static std::array<std::atomic<int64_t>, 128> known{};
    std::atomic<int64_t>& memory = known.at(index);
    if (memory == 0) {
      memory =
          static_cast<int64_t>(c10::getDeviceAllocator(at::kCUDA)->getMemoryInfo(index).second);
    }
    return memory;
  } else {
    return 0;
  }
}

}  // namespace detail

// The default of LinearOptions::logits_budget_bytes for hidden states on the device, which has an
// index if it is a GPU.
inline int64_t default_logits_budget_bytes(at::Device device) {
  const int64_t memory =
      device.is_cuda() ? detail::gpu_memory<c10::DeviceAllocator>(device.index()) : 0;
  return memory > 0 ? memory / kDefaultLogitsBudgetShare : kDefaultLogitsBudgetBytes;
}

}  // namespace simpo_ext
