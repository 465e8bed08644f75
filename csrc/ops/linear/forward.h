// The forward from hidden states and lm_head. The valid tokens are the R rows of a matrix, and the
// vocabulary is cut into chunks (plan.h). For each chunk
//
//   logits = rows weight[chunk]^T + bias[chunk]
//
// and a kernel folds these logits into each row's maximum and sum. The products are torch's.
//
// Memory besides arguments and results: one chunk of logits, the chunks that are kept for the
// backward, and the rows [R, H].
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "core/kernels.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/linear/plan.h"
#include "ops/linear/problem.h"
#include "ops/linear/rows.h"
#include "ops/tensors.h"

namespace simpo_ext::ops {

// The report of each token, and the sums over the chunks so far that it is computed from.
struct RowReports {
  Tensor mean_logit, entropy;  // [B, T]
  Tensor sum_z, sum_exp_z;     // [R]

  // logps are as select_tokens wrote them: 0 at masked positions, and NaN at valid ones. The report
  // starts with the same values.
  RowReports(const Tensor& hidden, const Tensor& logps, int64_t R)
      : mean_logit(new_empty(hidden, {logps.size(0), logps.size(1)}, ScalarType::Double)),
        entropy(new_empty(hidden, {logps.size(0), logps.size(1)}, ScalarType::Double)),
        sum_z(new_empty(hidden, {R}, ScalarType::Double)),
        sum_exp_z(new_empty(hidden, {R}, ScalarType::Double)) {
    torch::stable::copy_(mean_logit, logps);
    torch::stable::copy_(entropy, logps);
  }

  void put_into(WriteLogpsArgs& args, int64_t V) const {
    args.num_labels = V;
    args.sum_z = sum_z.const_data_ptr<double>();
    args.sum_exp_z = sum_exp_z.const_data_ptr<double>();
    args.mean_logit = mean_logit.mutable_data_ptr<double>();
    args.entropy = entropy.mutable_data_ptr<double>();
  }
};

// The sums over the chunks so far, one value for each of the R rows.
struct RowSums {
  void* max;  // compute
  double* sum_exp;
  void* label_z;  // compute
  // For a report, or both null.
  double* sum_z = nullptr;
  double* sum_exp_z = nullptr;
};

// Writes zeros to kept [kept, R, width] where no product writes: to rows without a token and to
// columns past the vocabulary. An op must not return uninitialized memory.
inline void zero_unwritten_logits(Tensor kept, const LogitsPlan& plan, int64_t V, int64_t count) {
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

// Computes each chunk of logits and folds it into sums. The first plan.kept chunks stay in kept.
template <class Device>
void fold_logits(const Device& device, const Problem& problem, const LogitsPlan& plan,
                 const Rows& rows, const Tensor& hidden, const Tensor& kept,
                 LogitTransform transform, const RowSums& sums) {
  zero_unwritten_logits(kept, plan, problem.V, rows.count);
  const Tensor hidden_rows = rows.gather(device, problem.dtype, problem.H, hidden);
  const bool keeps_all = plan.kept == plan.chunks;
  const Tensor scratch =
      keeps_all ? new_empty(hidden, {0}) : new_logits(device, hidden, rows.R, plan.width);
  // A shard without labels gets one chunk without columns, so that the kernel writes its sums.
  for (int64_t chunk = 0; chunk < std::max<int64_t>(plan.chunks, 1); ++chunk) {
    const Columns columns(problem, plan.width, chunk);
    const Tensor logits = chunk < plan.kept ? torch::stable::select(kept, 0, chunk) : scratch;
    if (columns.length > 0) {
      multiply_logits(problem, columns.of(logits, rows.count), rows.first(hidden_rows), columns);
    }
    device.token_logps({
        .dtype = problem.dtype,
        .V = columns.length,
        .logits = logits.const_data_ptr(),
        .logits_strides = {0, plan.width},
        .targets = rows.targets(),
        .transform = transform,
        .logps = nullptr,
        .max = sums.max,
        .sum_exp = sums.sum_exp,
        .first_label = problem.part.first_label + columns.begin,
        .num_labels = problem.part.num_labels,
        .continues = chunk > 0,
        .label_z = sums.label_z,
        .mean_logit = sums.sum_z,
        .entropy = sums.sum_exp_z,
    });
  }
}

// Writes a report to report unless it is null.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> score_hidden(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& labels, const Scoring& scoring, int64_t logits_budget_bytes,
    int64_t num_valid_tokens, std::optional<RowReports>* report) {
  const Device device(hidden, "hidden");
  const Problem problem(device, hidden, weight, bias, labels, scoring);
  const int64_t R = problem.rows_for(num_valid_tokens, logits_budget_bytes);
  const LogitsPlan plan(R, problem.V, hidden.element_size(), logits_budget_bytes,
                        Device::kChunkColumns);
  Tensor logps = new_empty(hidden, {problem.B, problem.T}, problem.compute);
  Tensor max = new_empty(hidden, {R}, problem.compute);
  Tensor sum_exp = new_empty(hidden, {R}, ScalarType::Double);
  const Tensor label_z = new_empty(hidden, {R}, problem.compute);
  const Tensor kept = device.new_large_for_writing(hidden, {plan.kept, R, plan.width});

  const Rows rows(device, problem, R, logps.mutable_data_ptr());
  RowSums sums{max.mutable_data_ptr(), sum_exp.mutable_data_ptr<double>(),
               label_z.mutable_data_ptr()};
  if (report != nullptr) {
    report->emplace(hidden, logps, R);
    sums.sum_z = (*report)->sum_z.template mutable_data_ptr<double>();
    sums.sum_exp_z = (*report)->sum_exp_z.template mutable_data_ptr<double>();
  }
  fold_logits(device, problem, plan, rows, hidden, kept, scoring.transform, sums);
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

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_token_logps(
    const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& labels,
    int64_t ignore_index, bool shift, double logit_scale, double softcap,
    int64_t logits_budget_bytes, int64_t num_valid_tokens) {
  return score_hidden<Device>(hidden, weight, bias, labels,
                              {ignore_index, shift, {logit_scale, softcap}}, logits_budget_bytes,
                              num_valid_tokens, nullptr);
}

// Also returns mean_logit and entropy.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_logps_report(
    const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& labels,
    int64_t ignore_index, bool shift, double logit_scale, double softcap,
    int64_t logits_budget_bytes, int64_t num_valid_tokens) {
  std::optional<RowReports> report;
  const auto [logps, max, sum_exp, kept] = score_hidden<Device>(
      hidden, weight, bias, labels, {ignore_index, shift, {logit_scale, softcap}},
      logits_budget_bytes, num_valid_tokens, &report);
  return {logps, max, sum_exp, kept, report->mean_logit, report->entropy};
}

}  // namespace simpo_ext::ops
