// token_logps with a report: which kernel a call takes. See token_logps.cuh.

#include "core/dispatch.h"
#include "cuda/token_logps.cuh"

namespace simpo_ext::cuda {

int token_logps_report(const TokenLogpsArgs& args, Stream stream) {
  int error = 0;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    using T = typename decltype(element)::type;
    using Logits = typename decltype(logits)::type;
    constexpr int kUnroll = kVectorsInFlight<T, Logits>;
    if (args.V * static_cast<int64_t>(sizeof(T)) >= kLargeRowBytes) {
      error = launch_token_logps<T, Logits, 256, kUnroll, true>(args, stream);
    } else {
      error = launch_token_logps<T, Logits, 128, kUnroll, true>(args, stream);
    }
  });
  return error;
}

}  // namespace simpo_ext::cuda
