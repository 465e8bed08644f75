// The ops from hidden states and lm_head on any device: which products are formed of what, and in
// whose memory. The products are torch's; all that happens between them are the kernels of Device.
//
// Valid tokens become the R rows of a matrix, and the vocabulary is worked on in chunks:
//   forward   logits = rows weight[chunk]^T, folded into each row's maximum and sum
//   backward  dlogits of the chunk from its logits, kept or formed again;
//             dweight[chunk] = dlogits^T rows, at once over all rows, so that it is rounded once;
//             dhidden += dlogits weight[chunk], added up in the compute dtype: inside the product
//             where Device can, or else after each product has been rounded
// For dhidden the label's element of dlogits is left out, which outweighs all others: its share is
// added at the end, unrounded. That makes up for the rounding of a chunk's product.
//
// Memory besides arguments and results: one chunk of logits and those kept (LogitsPlan), the rows
// [R, H], and in the backward the sum [R, H] of the compute dtype and, unless Device adds inside
// the products, one more [R, H]. A vocabulary of one chunk needs no sum, and one more [R, H]
// anyway.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace simpo_ext::ops {

// How the vocabulary is cut, and how much of the logits is kept for the backward. The fake kernel
// in simpo_ext/_ops.py has to come to the same shapes.
struct LogitsPlan {
  int64_t chunks;  // of the vocabulary, the last one narrower
  int64_t width;   // a multiple of 64, so that rows are aligned
  int64_t kept;    // chunks

  LogitsPlan(int64_t R, int64_t V, int64_t element_size, int64_t budget_bytes,
             int64_t most_columns) {
    constexpr int64_t kAlignment = 64;
    chunks = (V + most_columns - 1) / most_columns;
    width = chunks == 0 ? 0 : (V + chunks - 1) / chunks;
    width = (width + kAlignment - 1) / kAlignment * kAlignment;
    const int64_t chunk_bytes = std::max<int64_t>(R * width * element_size, 1);
    // One of what the budget allows is the chunk that is worked on.
    kept = std::clamp<int64_t>(budget_bytes / chunk_bytes - 1, 0, chunks);
  }
};

// out = a b
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // takes what is returned, a second handle of out
}

// out = a b^T + bias, rounded once
inline void linear_into(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(a), from(b), from(std::optional<Tensor>(bias)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

template <class Device>
class LinearOps {
 public:
  static std::tuple<Tensor, Tensor, Tensor, Tensor> linear_token_logps(
      const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& labels,
      int64_t ignore_index, bool shift, double logit_scale, double softcap,
      int64_t logits_budget_bytes, int64_t num_valid_tokens) {
    return forward(hidden, weight, bias, labels, ignore_index, shift, logit_scale, softcap,
                   logits_budget_bytes, num_valid_tokens, nullptr);
  }

  // And what is reported of each token: mean_logit and entropy.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_logps_report(
      const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& labels,
      int64_t ignore_index, bool shift, double logit_scale, double softcap,
      int64_t logits_budget_bytes, int64_t num_valid_tokens) {
    std::optional<Report> report;
    const auto [logps, max, sum_exp, kept] =
        forward(hidden, weight, bias, labels, ignore_index, shift, logit_scale, softcap,
                logits_budget_bytes, num_valid_tokens, &report);
    return {logps, max, sum_exp, kept, report->mean_logit, report->entropy};
  }

  // Of hidden, weight and bias, in that order; [0] where it was not asked for.
  static std::tuple<Tensor, Tensor, Tensor> linear_token_logps_backward(
      const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight,
      std::optional<Tensor> bias, const Tensor& labels, const Tensor& max, const Tensor& sum_exp,
      const Tensor& kept_logits, int64_t ignore_index, bool shift, double logit_scale,
      double softcap, bool needs_hidden, bool needs_weight, bool needs_bias) {
    const Device device(hidden, "hidden");
    const Problem problem(device, hidden, weight, bias, labels, ignore_index, shift);
    const Gradients gradients =
        multiply_gradients(device, problem, grad_logps, hidden, max, sum_exp, kept_logits,
                           {logit_scale, softcap}, {needs_hidden, needs_weight, needs_bias}, false);
    Tensor dhidden = new_empty(hidden, {0});
    if (needs_hidden) {
      const Rows& rows = gradients.rows;
      dhidden = device.new_large_for_writing(hidden, {problem.B, problem.T, problem.H});
      torch::stable::zero_(dhidden);
      if (problem.V > 0 && gradients.sums_all) {
        add_label_shares(device, problem, gradients, 0);
        scatter_rows(device, problem.dtype, rows, gradients.sum, dhidden);
      } else if (problem.V > 0) {
        device.hidden_gradient({
            .dtype = problem.dtype,
            .T = problem.T,
            .H = problem.H,
            .R = rows.count,
            .num_labels = problem.V,
            .positions = rows.positions.template const_data_ptr<int64_t>(),
            .labels = rows.labels.template const_data_ptr<int64_t>(),
            .label_gradients = gradients.of_labels.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .weight_stride_v = weight.stride(0),
            .weight_stride_h = weight.stride(1),
            .partial = gradients.partial.const_data_ptr(),
            .sum = gradients.sum.numel() > 0 ? gradients.sum.const_data_ptr() : nullptr,
            .dhidden = dhidden.mutable_data_ptr(),
        });
      }
    }
    return {dhidden, gradients.dweight, gradients.dbias};
  }

 protected:
  // Part of the vocabulary: labels [begin, begin + length).
  struct Columns;

  // What is reported of each token, and the sums of the parts so far that it comes from.
  struct Report {
    Tensor mean_logit, entropy;  // [B, T]
    Tensor sum_z, sum_exp_z;     // [R]

    // logps are as select_tokens left them, which these take over: 0 where masked, and NaN where a
    // row has to come to something.
    Report(const Tensor& hidden, const Tensor& logps, int64_t R)
        : mean_logit(new_empty(hidden, {logps.size(0), logps.size(1)}, ScalarType::Double)),
          entropy(new_empty(hidden, {logps.size(0), logps.size(1)}, ScalarType::Double)),
          sum_z(new_empty(hidden, {R}, ScalarType::Double)),
          sum_exp_z(new_empty(hidden, {R}, ScalarType::Double)) {
      torch::stable::copy_(mean_logit, logps);
      torch::stable::copy_(entropy, logps);
    }

    double* sums() const { return sum_z.mutable_data_ptr<double>(); }
    double* weighted_sums() const { return sum_exp_z.mutable_data_ptr<double>(); }

    void put_into(WriteLogpsArgs& args, int64_t V) const {
      args.num_labels = V;
      args.sum_z = sum_z.const_data_ptr<double>();
      args.sum_exp_z = sum_exp_z.const_data_ptr<double>();
      args.mean_logit = mean_logit.mutable_data_ptr<double>();
      args.entropy = entropy.mutable_data_ptr<double>();
    }
  };

  // The arguments, found to belong together.
  struct Problem {
    DType dtype;
    ScalarType compute;
    int64_t B, T, V, H;
    const Tensor& weight;
    const std::optional<Tensor>& bias;
    VocabPart part;  // of the vocabulary, what weight has
    Targets targets;

    Problem(const Device& device, const Tensor& hidden, const Tensor& weight_,
            const std::optional<Tensor>& bias_, const Tensor& labels, int64_t ignore_index,
            bool shift, std::optional<VocabPart> part_ = std::nullopt)
        : weight(weight_), bias(bias_) {
      dtype = dtype_of(hidden, "hidden");
      compute = compute_scalar_type(dtype);
      STD_TORCH_CHECK(hidden.dim() == 3, "hidden: expected shape [B, T, H], got ",
                      shape_text(hidden));
      STD_TORCH_CHECK(weight.dim() == 2, "weight: expected shape [V, H], got ", shape_text(weight));
      B = hidden.size(0), T = hidden.size(1), V = weight.size(0), H = weight.size(1);
      check_shape(hidden, {B, T, H}, "hidden");
      part = part_.value_or(VocabPart{0, V});
      part.check(V);
      device.check(weight, "weight");
      check_dtype(weight, hidden.scalar_type(), "weight");
      if (bias.has_value()) {
        device.check(*bias, "bias");
        check_shape(*bias, {V}, "bias");
        check_dtype(*bias, hidden.scalar_type(), "bias");
      }
      targets = make_targets(device, labels, ignore_index, shift);
      check_shape(labels, {B, T}, "labels");
    }

    DType compute_dtype() const {
      return compute == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
    }

    // R: as many as there may be valid tokens, of which -1 says nothing.
    int64_t rows_for(int64_t num_valid_tokens, int64_t logits_budget_bytes) const {
      STD_TORCH_CHECK(num_valid_tokens >= -1, "num_valid_tokens: expected -1 or more, got ",
                      num_valid_tokens);
      STD_TORCH_CHECK(logits_budget_bytes >= 0, "logits_budget_bytes: expected 0 or more, got ",
                      logits_budget_bytes);
      return num_valid_tokens >= 0 ? num_valid_tokens : B * T;
    }

    // logits = hidden_rows weight[columns]^T + bias[columns]
    void multiply_logits(const Tensor& logits, const Tensor& hidden_rows,
                         const Columns& columns) const {
      const Tensor weight_rows = columns.of_labels(weight);
      if (bias.has_value()) {
        linear_into(logits, hidden_rows, weight_rows, columns.of_labels(*bias));
      } else {
        multiply_into(logits, hidden_rows, transposed(weight_rows));
      }
    }
  };

  struct Columns {
    int64_t begin, length;

    Columns(const Problem& problem, int64_t width, int64_t chunk)
        : begin(chunk * width), length(std::min(width, problem.V - chunk * width)) {}

    // [R, width] -> [count, length]
    Tensor of(Tensor logits, int64_t count) const {
      Tensor rows = torch::stable::narrow(logits, 0, 0, count);
      return torch::stable::narrow(rows, 1, 0, length);
    }

    // [V, ...] -> [length, ...]
    Tensor of_labels(Tensor tensor) const {
      return torch::stable::narrow(tensor, 0, begin, length);
    }
  };

  // The rows of the products. Those from count on are without a token, and are left out of products
  // where the device's count is known.
  struct Rows {
    int64_t R, T, ignore_index;
    Tensor positions, labels;
    int64_t count;

    Rows(const Device& device, const Problem& problem, int64_t R, void* logps)
        : Rows(device, problem.weight, problem.targets, problem.dtype, R, logps,
               problem.part.num_labels) {}

    // Without num_labels, of labels that have been found to be among them.
    Rows(const Device& device, const Tensor& like, const Targets& targets, DType dtype, int64_t R_,
         void* logps, int64_t num_labels = std::numeric_limits<int64_t>::max())
        : R(R_),
          T(targets.T),
          ignore_index(targets.ignore_index),
          positions(new_empty(like, {R}, ScalarType::Long)),
          labels(new_empty(like, {R}, ScalarType::Long)) {
      count = device.select_tokens({
          .targets = targets,
          .num_labels = num_labels,
          .R = R,
          .positions = positions.mutable_data_ptr<int64_t>(),
          .labels = labels.mutable_data_ptr<int64_t>(),
          .dtype = dtype,
          .logps = logps,
      });
    }

    // As those of one sequence of R tokens.
    Targets targets() const {
      return {labels.const_data_ptr<int64_t>(), {0, 1}, 1, R, ignore_index, false};
    }

    Tensor first(Tensor rows) const { return torch::stable::narrow(rows, 0, 0, count); }

    // source [B, T, length], or [B, T] -> [R, length], of dtype; zeros where gradients [R], if they
    // are given, are 0.
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
  };

  // report: null, or what is to hold the tensors of one.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
      const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
      const Tensor& labels, int64_t ignore_index, bool shift, double logit_scale, double softcap,
      int64_t logits_budget_bytes, int64_t num_valid_tokens, std::optional<Report>* report) {
    const Device device(hidden, "hidden");
    const Problem problem(device, hidden, weight, bias, labels, ignore_index, shift);
    const int64_t R = problem.rows_for(num_valid_tokens, logits_budget_bytes);
    const LogitsPlan plan(R, problem.V, hidden.element_size(), logits_budget_bytes,
                          Device::kChunkColumns);
    Tensor logps = new_empty(hidden, {problem.B, problem.T}, problem.compute);
    Tensor max = new_empty(hidden, {R}, problem.compute);
    Tensor sum_exp = new_empty(hidden, {R}, ScalarType::Double);
    const Tensor label_z = new_empty(hidden, {R}, problem.compute);
    const Tensor kept = device.new_large_for_writing(hidden, {plan.kept, R, plan.width});

    const Rows rows(device, problem, R, logps.mutable_data_ptr());
    if (report != nullptr) report->emplace(hidden, logps, R);
    fold_logits(device, problem, plan, rows, hidden, kept, {logit_scale, softcap},
                max.mutable_data_ptr(), sum_exp.mutable_data_ptr<double>(),
                label_z.mutable_data_ptr(), report);
    if (plan.chunks > 0) {
      WriteLogpsArgs args{
          .dtype = problem.dtype,
          .R = R,
          .positions = rows.positions.template const_data_ptr<int64_t>(),
          .max = max.const_data_ptr(),
          .sum_exp = sum_exp.template const_data_ptr<double>(),
          .label_z = label_z.const_data_ptr(),
          .logps = logps.mutable_data_ptr(),
      };
      if (report != nullptr) (*report)->put_into(args, problem.V);
      device.write_logps(args);
    }
    return {logps, max, sum_exp, kept};
  }

  // Each chunk's logits, folded into the [R] of max, sum_exp and label_z; those of the first
  // plan.kept chunks stay in kept.
  static void fold_logits(const Device& device, const Problem& problem, const LogitsPlan& plan,
                          const Rows& rows, const Tensor& hidden, const Tensor& kept,
                          LogitTransform transform, void* max, double* sum_exp, void* label_z,
                          const std::optional<Report>* report = nullptr) {
    zero_what_no_product_writes(kept, plan, problem.V, rows.count);
    const Tensor hidden_rows = rows.gather(device, problem.dtype, problem.H, hidden);
    const bool keeps_all = plan.kept == plan.chunks;
    const Tensor scratch =
        keeps_all ? new_empty(hidden, {0}) : new_logits(device, hidden, rows.R, plan);
    // Of a shard without a label, one chunk without a column.
    for (int64_t chunk = 0; chunk < std::max<int64_t>(plan.chunks, 1); ++chunk) {
      const Columns columns(problem, plan.width, chunk);
      const Tensor logits = chunk < plan.kept ? torch::stable::select(kept, 0, chunk) : scratch;
      if (columns.length > 0) {
        problem.multiply_logits(columns.of(logits, rows.count), rows.first(hidden_rows), columns);
      }
      device.token_logps({
          .dtype = problem.dtype,
          .V = columns.length,
          .logits = logits.const_data_ptr(),
          .logits_strides = {0, plan.width},
          .targets = rows.targets(),
          .transform = transform,
          .logps = nullptr,
          .max = max,
          .sum_exp = sum_exp,
          .first_label = problem.part.first_label + columns.begin,
          .num_labels = problem.part.num_labels,
          .continues = chunk > 0,
          .label_z = label_z,
          .mean_logit = report != nullptr ? (*report)->sums() : nullptr,
          .entropy = report != nullptr ? (*report)->weighted_sums() : nullptr,
      });
    }
  }

  struct Needs {
    bool hidden, weight, bias;
  };

  // What comes of the products of dlogits; [0] where nothing was asked for.
  struct Gradients {
    Rows rows;
    Tensor of_labels;  // [R] compute: the labels' elements of dlogits
    // Shares of dhidden, without the labels' elements. With sums_all, sum has all of them, and
    // partial is without meaning.
    Tensor partial;  // [R, H]: the last chunk's
    Tensor sum;      // [R, H] compute: those of the chunks before; [0] if there are none
    bool sums_all;
    Tensor dweight, dbias;  // [V, H], [V]
  };

  static Gradients multiply_gradients(const Device& device, const Problem& problem,
                                      const Tensor& grad_logps, const Tensor& hidden,
                                      const Tensor& max, const Tensor& sum_exp,
                                      const Tensor& kept_logits, LogitTransform transform,
                                      const Needs& needs, bool wants_sum) {
    const int64_t B = problem.B, T = problem.T, V = problem.V, H = problem.H;
    const Tensor& weight = problem.weight;
    STD_TORCH_CHECK(problem.bias.has_value() || !needs.bias,
                    "needs_bias: expected false without a bias");
    device.check(grad_logps, "grad_logps");
    check_shape(grad_logps, {B, T}, "grad_logps");
    check_dtype(grad_logps, problem.compute, "grad_logps");
    STD_TORCH_CHECK(max.dim() == 1, "max: expected shape [R], got ", shape_text(max));
    const int64_t R = max.size(0);
    device.check(max, "max");
    check_dtype(max, problem.compute, "max");
    device.check(sum_exp, "sum_exp");
    check_shape(sum_exp, {R}, "sum_exp");
    check_dtype(sum_exp, ScalarType::Double, "sum_exp");
    const Tensor saved_max = as_contiguous(max), saved_sum_exp = as_contiguous(sum_exp);
    LogitsPlan plan(R, V, hidden.element_size(), 0, Device::kChunkColumns);
    device.check(kept_logits, "kept_logits");
    check_dtype(kept_logits, hidden.scalar_type(), "kept_logits");
    STD_TORCH_CHECK(kept_logits.dim() == 3 && kept_logits.size(0) <= plan.chunks,
                    "kept_logits: expected shape [up to ", plan.chunks, ", ", R, ", ", plan.width,
                    "], got ", shape_text(kept_logits));
    plan.kept = kept_logits.size(0);
    check_shape(kept_logits, {plan.kept, R, plan.width}, "kept_logits");
    const Tensor kept = as_contiguous(kept_logits);

    const Rows rows(device, problem, R, nullptr);
    const Tensor grads = rows.gather(device, problem.compute_dtype(), 1, grad_logps);
    const Tensor label_gradients = new_empty(hidden, {R}, problem.compute);
    const Tensor dlogits = new_logits(device, hidden, R, plan);
    const auto nothing = [&] { return new_empty(hidden, {0}); };  // outputs do not share memory
    const bool needs_rows = needs.weight || plan.kept < plan.chunks;
    const Tensor hidden_rows =
        needs_rows ? rows.gather(device, problem.dtype, H, hidden, grads.const_data_ptr())
                   : nothing();
    const Tensor dweight = needs.weight ? device.new_large_for_writing(weight, {V, H}) : nothing();
    const Tensor dbias = needs.bias ? new_empty(hidden, {1, V}) : nothing();
    const Tensor ones = new_ones(hidden, needs.bias ? rows.count : 0);
    const bool needs_sum = needs.hidden && (wants_sum || plan.chunks > 1);
    const bool adds_products = needs_sum && device.adds_products();
    const Tensor partial = needs.hidden && !adds_products ? new_empty(hidden, {R, H}) : nothing();
    const Tensor sum = needs_sum ? new_empty(hidden, {R, H}, problem.compute) : nothing();

    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const Columns columns(problem, plan.width, chunk);
      const Tensor logits = chunk < plan.kept ? torch::stable::select(kept, 0, chunk) : dlogits;
      if (chunk >= plan.kept) {
        problem.multiply_logits(columns.of(logits, rows.count), rows.first(hidden_rows), columns);
      }
      device.token_logps_backward({
          .dtype = problem.dtype,
          .V = columns.length,
          .logits = logits.const_data_ptr(),
          .logits_strides = {0, plan.width},
          .targets = rows.targets(),
          .transform = transform,
          .grad_logps = grads.const_data_ptr(),
          .grad_strides = {0, 1},
          .max = saved_max.const_data_ptr(),
          .sum_exp = saved_sum_exp.template const_data_ptr<double>(),
          .dlogits = dlogits.mutable_data_ptr(),
          .dlogits_strides = {0, plan.width},
          .first_label = problem.part.first_label + columns.begin,
          .num_labels = problem.part.num_labels,
          .label_gradients = label_gradients.mutable_data_ptr(),
      });
      const Tensor slopes = columns.of(dlogits, rows.count);
      if (adds_products) {
        device.add_product(rows.first(sum), slopes, columns.of_labels(weight), chunk == 0);
      } else if (needs.hidden) {
        multiply_into(rows.first(partial), slopes, columns.of_labels(weight));
        if (wants_sum || chunk + 1 < plan.chunks) {
          device.add_partial({
              .dtype = problem.dtype,
              .count = rows.count * H,
              .partial = partial.const_data_ptr(),
              .sum = sum.mutable_data_ptr(),
              .is_first = chunk == 0,
          });
        }
      }
      if (!needs.weight && !needs.bias) continue;
      device.put_label_gradients({
          .dtype = problem.dtype,
          .R = R,
          .V = columns.length,
          .first_label = problem.part.first_label + columns.begin,
          .ignore_index = rows.ignore_index,
          .labels = rows.labels.template const_data_ptr<int64_t>(),
          .label_gradients = label_gradients.const_data_ptr(),
          .dlogits = dlogits.mutable_data_ptr(),
          .dlogits_stride = plan.width,
      });
      if (needs.weight) {
        multiply_into(columns.of_labels(dweight), transposed(slopes), rows.first(hidden_rows));
      }
      if (needs.bias) {
        Tensor of_columns = dbias;
        multiply_into(torch::stable::narrow(of_columns, 1, columns.begin, columns.length), ones,
                      slopes);
      }
    }

    return {rows,
            label_gradients,
            partial,
            sum,
            wants_sum || adds_products,
            dweight,
            needs.bias ? torch::stable::select(dbias, 0, 0) : dbias};
  }

  // gradients.sum += the labels' shares, of those labels that are among first_label + [0, V).
  static void add_label_shares(const Device& device, const Problem& problem,
                               const Gradients& gradients, int64_t first_label) {
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

  // from [R, H] compute, each row to its position in to [B, T, H] of dtype, rounded once.
  static void scatter_rows(const Device& device, DType dtype, const Rows& rows, const Tensor& from,
                           const Tensor& to) {
    device.scatter_rows({
        .dtype = dtype,
        .H = to.size(2),
        .R = rows.count,
        .positions = rows.positions.template const_data_ptr<int64_t>(),
        .rows = from.const_data_ptr(),
        .to = to.mutable_data_ptr(),
    });
  }

  static Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

  static Tensor new_logits(const Device& device, const Tensor& like, int64_t R,
                           const LogitsPlan& plan) {
    return device.new_large_for_writing(like, {R, plan.width});
  }

  // Of kept [kept, R, width]: rows without a token, and columns past the vocabulary. What an op
  // returns has to have values.
  static void zero_what_no_product_writes(Tensor kept, const LogitsPlan& plan, int64_t V,
                                          int64_t count) {
    if (plan.kept == 0) return;
    const int64_t R = kept.size(1), columns = V - (plan.chunks - 1) * plan.width;
    if (count < R) {
      Tensor rows = torch::stable::narrow(kept, 1, count, R - count);
      torch::stable::zero_(rows);
    }
    if (plan.kept == plan.chunks && columns < plan.width) {
      Tensor last = torch::stable::select(kept, 0, plan.chunks - 1);
      Tensor padding = torch::stable::narrow(last, 1, columns, plan.width - columns);
      torch::stable::zero_(padding);
    }
  }

  // [1, count]
  static Tensor new_ones(const Tensor& like, int64_t count) {
    return torch::stable::fill_(new_empty(like, {1, count}), 1.0);
  }
};

template <class Device>
void register_linear_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("linear_token_logps", TORCH_BOX(&LinearOps<Device>::linear_token_logps));
  m.impl("linear_token_logps_report", TORCH_BOX(&LinearOps<Device>::linear_token_logps_report));
  m.impl("linear_token_logps_backward", TORCH_BOX(&LinearOps<Device>::linear_token_logps_backward));
}

}  // namespace simpo_ext::ops
