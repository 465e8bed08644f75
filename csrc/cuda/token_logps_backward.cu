// token_logps_backward: which kernel a call takes. See token_logps.cuh.

#include "core/dispatch.h"
#include "cuda/token_logps.cuh"

namespace simpo_ext::cuda {

int token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream) {
  if (args.targets.B * args.targets.T * args.V == 0) return 0;
  int error = 0;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    using T = typename decltype(element)::type;
    using Logits = typename decltype(logits)::type;
    constexpr int kUnroll = kVectorsInFlight<T, Logits>;
    if (args.V * static_cast<int64_t>(sizeof(T)) >= kLargeRowBytes) {
      error = launch_token_logps_backward<T, Logits, 256, kUnroll>(args, stream);
    } else {
      error = launch_token_logps_backward<T, Logits, 128, kUnroll>(args, stream);
    }
  });
  return error;
}

}  // namespace simpo_ext::cuda
