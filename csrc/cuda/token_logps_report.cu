// token_logps with a report. See token_logps.cuh.

#include "cuda/token_logps_forward.cuh"

namespace simpo_ext::cuda {

int token_logps_report(const TokenLogpsArgs& args, Stream stream) {
  return dispatch_token_logps<true>(args, stream);
}

}  // namespace simpo_ext::cuda
