// The backward from hidden states and lm_head, chunk by chunk like the forward. For each chunk
//
//   dlogits        from its logits, which were kept or are recomputed
//   dhidden       += dlogits weight[chunk]
//   dweight[chunk] = dlogits^T rows
//   dbias[chunk]   = the sum of dlogits over rows
//
// dweight of a chunk is one product over all rows, so it is rounded once. dhidden is added up in
// the compute dtype: inside the product if the device can do that, otherwise by a kernel after each
// product has been rounded.
//
// The products for dhidden leave out the label's element of dlogits, which outweighs all others. A
// kernel adds its term at the end, unrounded. This makes up for the rounding of the products.
//
// Memory besides arguments and results: one chunk of dlogits, the rows [R, H], the sum [R, H] in
// the compute dtype, and one more [R, H] unless the device adds inside the products. With a single
// chunk there is no sum, but always the other [R, H].
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/linear/plan.h"
#include "ops/linear/problem.h"
#include "ops/linear/products.h"
#include "ops/linear/rows.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

struct GradientNeeds {
  bool hidden, weight, bias;
};

// The results of the products. Tensors that are not needed are [0].
struct LinearGradients {
  Rows rows;
  Tensor of_labels;  // [R] compute: the labels' elements of dlogits
  // dhidden of the rows, without the labels' terms: sum + partial, or with sums_all only sum.
  Tensor partial;  // [R, H]: the last chunk's product
  Tensor sum;      // [R, H] compute: the products of the chunks before; [0] if there are none
  bool sums_all;
  Tensor dweight, dbias;  // [V, H], [V]
};

// The values that the forward saved.
struct SavedRows {
  int64_t R;
  Tensor max, sum_exp;  // [R] contiguous

  template <class Device>
  SavedRows(const Device& device, const Problem& problem, const Tensor& max_,
            const Tensor& sum_exp_)
      : max(max_), sum_exp(sum_exp_) {
    check_dim(max, 1, "max", "[R]");
    R = max.size(0);
    device.check(max, "max");
    check_dtype(max, problem.compute, "max");
    device.check(sum_exp, "sum_exp");
    check_shape(sum_exp, {R}, "sum_exp");
    check_dtype(sum_exp, ScalarType::Double, "sum_exp");
    max = as_contiguous(max);
    sum_exp = as_contiguous(sum_exp);
  }
};

// The forward's plan. The number of kept chunks is that of kept_logits.
template <class Device>
LogitsPlan plan_of(const Device& device, const Problem& problem, int64_t R, const Tensor& hidden,
                   const Tensor& kept_logits) {
  LogitsPlan plan(R, problem.V, hidden.element_size(), 0, Device::kChunkColumns);
  device.check(kept_logits, "kept_logits");
  check_dtype(kept_logits, hidden.scalar_type(), "kept_logits");
  STD_TORCH_CHECK(kept_logits.dim() == 3 && kept_logits.size(0) <= plan.chunks,
                  "kept_logits: expected shape [up to ", plan.chunks, ", ", R, ", ", plan.width,
                  "], got ", shape_text(kept_logits));
  plan.kept = kept_logits.size(0);
  check_shape(kept_logits, {plan.kept, R, plan.width}, "kept_logits");
  return plan;
}

template <class Device>
class LinearBackward {
 public:
  // wants_sum: return dhidden as a sum in the compute dtype even with a single chunk.
  LinearBackward(const Device& device, const Problem& problem, const Tensor& grad_logps,
                 const Tensor& hidden, const SavedRows& saved, const Tensor& kept_logits,
                 LogitTransform transform, const GradientNeeds& needs, bool wants_sum)
      : device_(device),
        problem_(problem),
        saved_(saved),
        transform_(transform),
        needs_(needs),
        wants_sum_(wants_sum),
        plan_(plan_of(device, problem, saved.R, hidden, kept_logits)),
        kept_(as_contiguous(kept_logits)),
        rows_(device, problem, saved.R, nullptr),
        grads_(rows_.gather(device, compute_dtype(problem.dtype), 1, grad_logps)),
        label_gradients_(new_empty(hidden, {saved.R}, problem.compute)),
        dlogits_(new_logits(device, hidden, saved.R, plan_.width)),
        hidden_rows_(gather_hidden(hidden)),
        dweight_(needs.weight ? device.new_large_for_writing(problem.weight, {problem.V, problem.H})
                              : new_nothing(hidden)),
        dbias_(needs.bias ? new_empty(hidden, {1, problem.V}) : new_nothing(hidden)),
        ones_(torch::stable::fill_(new_empty(hidden, {1, needs.bias ? rows_.count : 0}), 1.0)),
        needs_sum_(needs.hidden && (wants_sum || plan_.chunks > 1)),
        adds_products_(needs_sum_ && device.adds_products()),
        partial_(needs.hidden && !adds_products_ ? new_empty(hidden, {saved.R, problem.H})
                                                 : new_nothing(hidden)),
        sum_(needs_sum_ ? new_empty(hidden, {saved.R, problem.H}, problem.compute)
                        : new_nothing(hidden)) {}

  LinearGradients run() const {
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const Columns columns(problem_, plan_.width, chunk);
      write_dlogits(logits_of(chunk, columns), columns);
      const Tensor slopes = columns.of(dlogits_, rows_.count);
      if (needs_.hidden) add_to_hidden(slopes, columns, chunk);
      if (!needs_.weight && !needs_.bias) continue;
      put_label_gradients(columns);
      if (needs_.weight) {
        multiply_into(columns.of_labels(dweight_), transposed(slopes), rows_.first(hidden_rows_));
      }
      if (needs_.bias) write_bias(slopes, columns);
    }
    return {rows_,
            label_gradients_,
            partial_,
            sum_,
            wants_sum_ || adds_products_,
            dweight_,
            needs_.bias ? torch::stable::select(dbias_, 0, 0) : dbias_};
  }

 private:
  // An output that is not needed. Each has its own, since outputs of an op must not share memory.
  static Tensor new_nothing(const Tensor& like) { return new_empty(like, {0}); }

  // Needed for dweight and to recompute logits. Rows without a gradient are zeros.
  Tensor gather_hidden(const Tensor& hidden) const {
    const bool is_needed = needs_.weight || plan_.kept < plan_.chunks;
    if (!is_needed) return new_nothing(hidden);
    return rows_.gather(device_, problem_.dtype, problem_.H, hidden, grads_.const_data_ptr());
  }

  // The chunk's logits [R, width], kept by the forward or recomputed.
  Tensor logits_of(int64_t chunk, const Columns& columns) const {
    if (chunk < plan_.kept) return torch::stable::select(kept_, 0, chunk);
    multiply_logits(problem_, columns.of(dlogits_, rows_.count), rows_.first(hidden_rows_),
                    columns);
    return dlogits_;
  }

  // dlogits of the chunk, with 0 for the labels' elements, which go to label_gradients_.
  void write_dlogits(const Tensor& logits, const Columns& columns) const {
    device_.token_logps_backward({
        .dtype = problem_.dtype,
        .V = columns.length,
        .logits = logits.const_data_ptr(),
        .logits_strides = {0, plan_.width},
        .targets = rows_.targets(),
        .transform = transform_,
        .grad_logps = grads_.const_data_ptr(),
        .grad_strides = {0, 1},
        .max = saved_.max.const_data_ptr(),
        .sum_exp = saved_.sum_exp.template const_data_ptr<double>(),
        .dlogits = dlogits_.mutable_data_ptr(),
        .dlogits_strides = {0, plan_.width},
        .first_label = problem_.part.first_label + columns.begin,
        .num_labels = problem_.part.num_labels,
        .label_gradients = label_gradients_.mutable_data_ptr(),
    });
  }

  void add_to_hidden(const Tensor& slopes, const Columns& columns, int64_t chunk) const {
    const Tensor weight_rows = columns.of_labels(problem_.weight);
    if (adds_products_) {
      device_.add_product(rows_.first(sum_), slopes, weight_rows, chunk == 0);
      return;
    }
    multiply_into(rows_.first(partial_), slopes, weight_rows);
    const bool is_last = chunk + 1 == plan_.chunks;
    if (is_last && !wants_sum_) return;  // hidden_gradient adds the last chunk's product
    device_.add_partial({
        .dtype = problem_.dtype,
        .count = rows_.count * problem_.H,
        .partial = partial_.const_data_ptr(),
        .sum = sum_.mutable_data_ptr(),
        .is_first = chunk == 0,
    });
  }

  // Puts the labels' elements into dlogits, for the products that need them.
  void put_label_gradients(const Columns& columns) const {
    device_.put_label_gradients({
        .dtype = problem_.dtype,
        .R = rows_.R,
        .V = columns.length,
        .first_label = problem_.part.first_label + columns.begin,
        .ignore_index = rows_.ignore_index,
        .labels = rows_.labels.template const_data_ptr<int64_t>(),
        .label_gradients = label_gradients_.const_data_ptr(),
        .dlogits = dlogits_.mutable_data_ptr(),
        .dlogits_stride = plan_.width,
    });
  }

  void write_bias(const Tensor& slopes, const Columns& columns) const {
    Tensor dbias = dbias_;
    multiply_into(torch::stable::narrow(dbias, 1, columns.begin, columns.length), ones_, slopes);
  }

  // The order matters: members are initialized from those above them.
  const Device& device_;
  const Problem& problem_;
  const SavedRows& saved_;
  LogitTransform transform_;
  GradientNeeds needs_;
  bool wants_sum_;
  LogitsPlan plan_;
  Tensor kept_;  // [kept, R, width]
  Rows rows_;
  Tensor grads_;            // [R, 1] compute: grad_logps of the rows
  Tensor label_gradients_;  // [R] compute
  Tensor dlogits_;          // [R, width], also for recomputed logits
  Tensor hidden_rows_;      // [R, H]
  Tensor dweight_, dbias_;  // [V, H], [1, V]
  Tensor ones_;             // [1, count]
  bool needs_sum_, adds_products_;
  Tensor partial_, sum_;
};

template <class Device>
LinearGradients multiply_gradients(const Device& device, const Problem& problem,
                                   const Tensor& grad_logps, const Tensor& hidden,
                                   const Tensor& max, const Tensor& sum_exp,
                                   const Tensor& kept_logits, LogitTransform transform,
                                   const GradientNeeds& needs, bool wants_sum) {
  STD_TORCH_CHECK(problem.bias.has_value() || !needs.bias,
                  "needs_bias: expected false without a bias");
  device.check(grad_logps, "grad_logps");
  check_shape(grad_logps, {problem.B, problem.T}, "grad_logps");
  check_dtype(grad_logps, problem.compute, "grad_logps");
  const SavedRows saved(device, problem, max, sum_exp);
  return LinearBackward<Device>(device, problem, grad_logps, hidden, saved, kept_logits, transform,
                                needs, wants_sum)
      .run();
}

// Adds the terms of the labels in [first_label, first_label + V) to gradients.sum.
template <class Device>
void add_label_shares(const Device& device, const Problem& problem,
                      const LinearGradients& gradients, int64_t first_label) {
  const Rows& rows = gradients.rows;
  device.add_label_shares({
      .dtype = problem.dtype,
      .H = problem.H,
      .R = rows.count,
      .first_label = first_label,
      .V = problem.V,
      .ignore_index = rows.ignore_index,
      .labels = rows.labels.template const_data_ptr<int64_t>(),
      .label_gradients = gradients.of_labels.const_data_ptr(),
      .weight = problem.weight.const_data_ptr(),
      .weight_stride_v = problem.weight.stride(0),
      .weight_stride_h = problem.weight.stride(1),
      .sum = gradients.sum.mutable_data_ptr(),
  });
}

// dhidden [B, T, H] from the rows' sums, the last product and the labels' terms.
template <class Device>
Tensor hidden_gradient(const Device& device, const Problem& problem, const Tensor& hidden,
                       const LinearGradients& gradients) {
  const Rows& rows = gradients.rows;
  Tensor dhidden = device.new_large_for_writing(hidden, {problem.B, problem.T, problem.H});
  torch::stable::zero_(dhidden);
  if (problem.V == 0) return dhidden;
  if (gradients.sums_all) {
    add_label_shares(device, problem, gradients, 0);
    rows.scatter(device, problem.dtype, gradients.sum, dhidden);
    return dhidden;
  }
  device.hidden_gradient({
      .dtype = problem.dtype,
      .T = problem.T,
      .H = problem.H,
      .R = rows.count,
      .num_labels = problem.V,
      .positions = rows.positions.template const_data_ptr<int64_t>(),
      .labels = rows.labels.template const_data_ptr<int64_t>(),
      .label_gradients = gradients.of_labels.const_data_ptr(),
      .weight = problem.weight.const_data_ptr(),
      .weight_stride_v = problem.weight.stride(0),
      .weight_stride_h = problem.weight.stride(1),
      .partial = gradients.partial.const_data_ptr(),
      .sum = gradients.sum.numel() > 0 ? gradients.sum.const_data_ptr() : nullptr,
      .dhidden = dhidden.mutable_data_ptr(),
  });
  return dhidden;
}

// dhidden, dweight, dbias. Gradients that are not needed are [0].
template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_token_logps_backward(
    const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight,
    std::optional<Tensor> bias, const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
    const Tensor& kept_logits, int64_t ignore_index, bool shift, double logit_scale, double softcap,
    bool needs_hidden, bool needs_weight, bool needs_bias) {
  const Device device(hidden, "hidden");
  const Scoring scoring{ignore_index, shift, {logit_scale, softcap}};
  const Problem problem(device, hidden, weight, bias, labels, scoring);
  const LinearGradients gradients =
      multiply_gradients(device, problem, grad_logps, hidden, max, sum_exp, kept_logits,
                         scoring.transform, {needs_hidden, needs_weight, needs_bias}, false);
  const Tensor dhidden =
      needs_hidden ? hidden_gradient(device, problem, hidden, gradients) : new_empty(hidden, {0});
  return {dhidden, gradients.dweight, gradients.dbias};
}

}  // namespace simpo_ext::ops
