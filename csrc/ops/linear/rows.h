// The valid tokens of a batch as R rows of a matrix: gathered from [B, T] and scattered back.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/linear/problem.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

// Rows from count on have no token. If the host knows the number of valid tokens, count is that
// number, and the products leave out the other rows. Otherwise count is R.
struct Rows {
  int64_t R, T, ignore_index;
  Tensor positions, labels;  // [R]
  int64_t count;

  template <class Device>
  Rows(const Device& device, const Problem& problem, int64_t R_, void* logps)
      : Rows(device, problem.weight, problem.targets, problem.dtype, R_, logps,
             problem.part.num_labels) {}

  // The default of num_labels is for labels that were checked before.
  template <class Device>
  Rows(const Device& device, const Tensor& like, const Targets& targets_of_batch, DType dtype,
       int64_t R_, void* logps, int64_t num_labels = std::numeric_limits<int64_t>::max())
      : R(R_),
        T(targets_of_batch.T),
        ignore_index(targets_of_batch.ignore_index),
        positions(new_empty(like, {R}, ScalarType::Long)),
        labels(new_empty(like, {R}, ScalarType::Long)) {
    count = device.select_tokens({
        .targets = targets_of_batch,
        .num_labels = num_labels,
        .R = R,
        .positions = positions.mutable_data_ptr<int64_t>(),
        .labels = labels.mutable_data_ptr<int64_t>(),
        .dtype = dtype,
        .logps = logps,
    });
  }

  // The targets of the rows, as one sequence of R tokens.
  Targets targets() const {
    return {labels.const_data_ptr<int64_t>(), {0, 1}, 1, R, ignore_index, false};
  }

  // [R, ...] -> [count, ...]
  Tensor first(Tensor rows) const { return torch::stable::narrow(rows, 0, 0, count); }

  // source [B, T, length] of dtype, or [B, T] -> [R, length]. With gradients [R], which may be
  // null, rows whose gradient is 0 become zeros.
  template <class Device>
  Tensor gather(const Device& device, DType dtype, int64_t length, const Tensor& source,
                const void* gradients = nullptr) const {
    const bool has_unit_stride = source.dim() < 3 || length <= 1 || source.stride(2) == 1;
    const Tensor tokens = has_unit_stride ? source : as_contiguous(source);
    const Tensor rows = new_empty(source, {R, length});
    device.gather_rows({
        .dtype = dtype,
        .T = T,
        .H = length,
        .R = R,
        .positions = positions.const_data_ptr<int64_t>(),
        .source = tokens.const_data_ptr(),
        .source_strides = token_strides(tokens),
        .rows = rows.mutable_data_ptr(),
        .gradients = gradients,
    });
    return rows;
  }

  // from [R, H] compute -> to [B, T, H] of dtype, each row at its position, rounded once.
  template <class Device>
  void scatter(const Device& device, DType dtype, const Tensor& from, const Tensor& to) const {
    device.scatter_rows({
        .dtype = dtype,
        .H = to.size(2),
        .R = count,
        .positions = positions.const_data_ptr<int64_t>(),
        .rows = from.const_data_ptr(),
        .to = to.mutable_data_ptr(),
    });
  }
};

template <class Device>
Tensor new_logits(const Device& device, const Tensor& like, int64_t R, int64_t width) {
  return device.new_large_for_writing(like, {R, width});
}

}  // namespace simpo_ext::ops
