// token_logps without a report. See token_logps.cuh.

#include "cuda/token_logps_forward.cuh"

namespace simpo_ext::cuda {

int64_t shared_segments(DType dtype, int64_t N, int64_t V) {
  int64_t count = 0;
  dispatch_dtype(dtype, [&](auto element) {
    const int segments = num_segments<typename decltype(element)::type>(V);
    if (blocks_per_row(N, segments) > 1) count = segments;
  });
  return count;
}

int token_logps(const TokenLogpsArgs& args, Stream stream) {
  if (args.targets.B * args.targets.T == 0) return 0;
  if (args.mean_logit != nullptr) return token_logps_report(args, stream);
  const int error = dispatch_token_logps<false>(args, stream);
  if (error != 0 || args.segments == nullptr) return error;
  return merge_shards({.dtype = args.dtype == DType::kFloat64 ? args.dtype : DType::kFloat32,
                       .targets = args.targets,
                       .K = shared_segments(args.dtype, args.targets.B * args.targets.T, args.V),
                       .shards = args.segments,
                       .positions = nullptr,
                       .logps = args.logps,
                       .max = args.max,
                       .sum_exp = args.sum_exp},
                      stream);
}

}  // namespace simpo_ext::cuda
