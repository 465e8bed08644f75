// token_logps_backward: selects the kernel for a call. See token_logps.cuh.

#include "core/dispatch.h"
#include "cuda/token_logps_backward.cuh"

namespace simpo_ext::cuda {

int token_logps_backward(const TokenLogpsBackwardArgs& args, Stream stream) {
  if (args.targets.B * args.targets.T * args.V == 0) return 0;
  int error = 0;
  dispatch_logits(args.dtype, args.transform, [&](auto element, auto logits) {
    using T = typename decltype(element)::type;
    using Logits = typename decltype(logits)::type;
    constexpr int kUnroll = kVectorsInFlight<T, Logits>;
    if (is_large_row<T, Logits>(args.V)) {
      error = launch_token_logps_backward<T, Logits, kLargeBlock, kUnroll, false>(args, stream);
    } else {
      error = launch_token_logps_backward<T, Logits, kSmallBlock, kUnroll, true>(args, stream);
    }
  });
  return error;
}

}  // namespace simpo_ext::cuda
