// Writes values of each row's label: its log-probability, after all chunks of logits have been
// summed, and its element of dlogits.
//
// Memory contract, with e the size of a logit and c that of a compute value:
//
//   write_logps: reads 8 bytes a row. If the row has a token, reads 8 + 2 c bytes more and writes c
//   bytes. A report reads and writes 16 bytes more.
//   put_label_gradients: reads 8 bytes a row. If the chunk has the row's label, reads c bytes and
//   writes e bytes.
//
// No scratch. Every element has one writer.

#include <cstdint>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cuda/elements.h"
#include "cuda/platform.h"
#include "cuda/rows.h"
#include "cuda/token_rows.cuh"

namespace simpo_ext::cuda {
namespace {

template <typename Scalar>
__global__ void __launch_bounds__(kRowsPerBlock) write_logps_kernel(WriteLogpsArgs args) {
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const int64_t position = load(args.positions + row);
  if (position < 0) return;
  const LogSumExp<Scalar> logsumexp{load(static_cast<const Scalar*>(args.max) + row),
                                    load(args.sum_exp + row)};
  const Scalar label_z = load(static_cast<const Scalar*>(args.label_z) + row);
  store(static_cast<Scalar*>(args.logps) + position,
        static_cast<Scalar>(logsumexp.log_probability(label_z)));
  if (args.mean_logit == nullptr) return;
  const RowReport report{load(args.sum_z + row), load(args.sum_exp_z + row)};
  store(args.mean_logit + position, report.sum_z / static_cast<double>(args.num_labels));
  store(args.entropy + position, report.entropy(logsumexp.sum));
}

template <typename T>
__global__ void __launch_bounds__(kRowsPerBlock)
    put_label_gradients_kernel(PutLabelGradientsArgs args) {
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const int64_t label = load(args.labels + row);
  if (label == args.ignore_index || !is_in_part(label, args.first_label, args.V)) return;
  const Compute<T> value = load(static_cast<const Compute<T>*>(args.label_gradients) + row);
  store(static_cast<T*>(args.dlogits) + row * args.dlogits_stride + (label - args.first_label),
        Elements<T>::narrow(value));
}

}  // namespace

int write_logps(const WriteLogpsArgs& args, Stream stream) {
  if (args.R == 0) return 0;
  int error = 0;
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    error = launch(write_logps_kernel<typename decltype(tag)::type>, grid_of_threads(args.R),
                   dim3(kRowsPerBlock), stream, args);
  });
  return error;
}

int put_label_gradients(const PutLabelGradientsArgs& args, Stream stream) {
  if (args.R * args.V == 0) return 0;
  int error = 0;
  dispatch_dtype(args.dtype, [&](auto tag) {
    error = launch(put_label_gradients_kernel<typename decltype(tag)::type>,
                   grid_of_threads(args.R), dim3(kRowsPerBlock), stream, args);
  });
  return error;
}

}  // namespace simpo_ext::cuda
