// token_logps without a report. See token_logps.cuh.

#include "cuda/token_logps.cuh"

namespace simpo_ext::cuda {

int token_logps(const TokenLogpsArgs& args, Stream stream) {
  if (args.targets.B * args.targets.T == 0) return 0;
  if (args.mean_logit != nullptr) return token_logps_report(args, stream);
  return dispatch_token_logps<false>(args, stream);
}

}  // namespace simpo_ext::cuda
