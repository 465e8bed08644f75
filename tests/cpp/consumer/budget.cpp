#include "budget.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <simpo_ext/simpo_ext.h>

#include <stdexcept>
#include <utility>

#include "../require.h"

namespace {

// Tells libtorch the memory of a GPU that this machine does not have.
struct PretendedGpus final : c10::DeviceAllocator {
  static constexpr size_t kMemory = 150'121'545'727;  // not a multiple of 16
  int asked = 0;

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    ++asked;
    return {1, kMemory + 16 * index};
  }

  c10::DataPtr allocate(size_t) override { throw std::logic_error("there is no GPU"); }
  void copy_data(void*, const void*, size_t) const override {}
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
};

}  // namespace

void check_default_budget() {
  using simpo_ext::default_logits_budget_bytes;
  c10::Allocator* const before = c10::GetAllocator(at::kCUDA);
  PretendedGpus gpus;
  c10::SetAllocator(at::kCUDA, &gpus);
  const auto budget_of_gpu = [](at::DeviceIndex index) {
    return default_logits_budget_bytes(at::Device(at::kCUDA, index));
  };
  constexpr int64_t kSixteenth = PretendedGpus::kMemory / 16;
  require(budget_of_gpu(0) == kSixteenth, "a sixteenth of the GPU's memory");
  require(budget_of_gpu(3) == kSixteenth + 3, "a sixteenth of that GPU's memory");
  require(budget_of_gpu(0) == kSixteenth && gpus.asked == 2, "each GPU is asked about once");
  require(default_logits_budget_bytes(at::kCPU) == int64_t{1} << 30, "a GiB on CPUs");
  c10::SetAllocator(at::kCUDA, before);
}
