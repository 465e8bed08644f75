// token_logps: which kernel a call takes. See token_logps.cuh.

#include "core/dtype_dispatch.h"
#include "cuda/token_logps.cuh"

namespace simpo_ext::cuda {
namespace {

template <typename T>
int forward(const TokenLogpsArgs& args, Stream stream) {
  using Scalar = Compute<T>;
  constexpr int kUnroll = kVectorsInFlight<T>;
  if (args.transform.softcap != 0.0) {
    return launch_token_logps<T, SoftcapTransform<Scalar>, 256, kUnroll>(args, stream);
  }
  if (args.V * static_cast<int64_t>(sizeof(T)) >= kLargeRowBytes) {
    return launch_token_logps<T, LinearTransform<Scalar>, 512, kUnroll>(args, stream);
  }
  return launch_token_logps<T, LinearTransform<Scalar>, 128, kUnroll>(args, stream);
}

}  // namespace

int token_logps(const TokenLogpsArgs& args, Stream stream) {
  if (args.targets.B * args.targets.T == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype,
                 [&](auto tag) { error = forward<typename decltype(tag)::type>(args, stream); });
  return error;
}

}  // namespace simpo_ext::cuda
