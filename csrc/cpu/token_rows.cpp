// The tokens of a batch as rows of the matrix products, on the CPU: selects the tokens, gathers
// their hidden states, and writes their log-probs and gradients.
//
// Memory contract: select_tokens reads labels and writes 16 bytes a row. gather_rows reads and
// writes each row of H once. hidden_gradient reads a row's partial product, its sum and its label's
// row of the weight once, and writes the row once. add_partial reads a product and updates the sum.
// Nothing is allocated.

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/dispatch.h"
#include "core/kernels.h"
#include "core/logsumexp.h"
#include "core/row_report.h"
#include "cpu/labels.h"

namespace simpo_ext::cpu {
namespace {

// With fewer elements than this, a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 15;

int64_t rows_per_task(int64_t H) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(H, 1)); }

}  // namespace

Selection select_tokens(const SelectTokensArgs& args) {
  const Targets& targets = args.targets;
  const LabelError error = find_label_error(targets, args.num_labels);
  if (error.found()) return {error, 0};
  int64_t count = 0;
  for (int64_t b = 0; b < targets.B; ++b) {
    for (int64_t t = 0; t < targets.T; ++t) {
      if (!targets.is_valid(b, t)) continue;
      if (count < args.R) {
        args.positions[count] = b * targets.T + t;
        args.labels[count] = targets.at(b, t);
      }
      ++count;
    }
  }
  for (int64_t i = count; i < args.R; ++i) {
    args.positions[i] = -1;
    args.labels[i] = targets.ignore_index;
  }
  if (args.logps != nullptr) {
    dispatch_compute_dtype(args.dtype, [&](auto tag) {
      using Scalar = typename decltype(tag)::type;
      Scalar* logps = static_cast<Scalar*>(args.logps);
      for (int64_t b = 0; b < targets.B; ++b) {
        for (int64_t t = 0; t < targets.T; ++t) {
          *logps++ = targets.is_valid(b, t) ? std::numeric_limits<Scalar>::quiet_NaN() : Scalar(0);
        }
      }
    });
  }
  return {{}, count};
}

void gather_rows(const GatherRowsArgs& args, ParallelFor parallel_for) {
  const int64_t size = size_of(args.dtype), row_bytes = args.H * size;
  const char* source = static_cast<const char*>(args.source);
  char* rows = static_cast<char*>(args.rows);
  const auto has_part = [&](int64_t i) {
    if (args.gradients == nullptr) return true;
    if (args.dtype == DType::kFloat64) return static_cast<const double*>(args.gradients)[i] != 0.0;
    return static_cast<const float*>(args.gradients)[i] != 0.0f;
  };
  parallel_for(0, args.R, rows_per_task(args.H), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t position = args.positions[i];
      if (position < 0 || !has_part(i)) {
        std::memset(rows + i * row_bytes, 0, static_cast<size_t>(row_bytes));
        continue;
      }
      const int64_t offset = args.source_strides.offset(position / args.T, position % args.T);
      std::memcpy(rows + i * row_bytes, source + offset * size, static_cast<size_t>(row_bytes));
    }
  });
}

void write_logps(const WriteLogpsArgs& args) {
  dispatch_compute_dtype(args.dtype, [&](auto tag) {
    using Scalar = typename decltype(tag)::type;
    const Scalar* max = static_cast<const Scalar*>(args.max);
    const Scalar* label_z = static_cast<const Scalar*>(args.label_z);
    for (int64_t i = 0; i < args.R; ++i) {
      if (args.positions[i] < 0) continue;
      const LogSumExp<Scalar> logsumexp{max[i], args.sum_exp[i]};
      static_cast<Scalar*>(args.logps)[args.positions[i]] =
          static_cast<Scalar>(logsumexp.log_probability(label_z[i]));
      if (args.mean_logit == nullptr) continue;
      const RowReport report{args.sum_z[i], args.sum_exp_z[i]};
      args.mean_logit[args.positions[i]] = report.sum_z / static_cast<double>(args.num_labels);
      args.entropy[args.positions[i]] = report.entropy(logsumexp.sum);
    }
  });
}

void put_label_gradients(const PutLabelGradientsArgs& args) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Compute<T>* label_gradients = static_cast<const Compute<T>*>(args.label_gradients);
    for (int64_t i = 0; i < args.R; ++i) {
      const int64_t column = args.labels[i] - args.first_label;
      if (args.labels[i] == args.ignore_index || column < 0 || column >= args.V) continue;
      static_cast<T*>(args.dlogits)[i * args.dlogits_stride + column] =
          narrow<T>(label_gradients[i]);
    }
  });
}

void add_partial(const AddPartialArgs& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* partial = static_cast<const T*>(args.partial);
    Compute<T>* sum = static_cast<Compute<T>*>(args.sum);
    parallel_for(0, args.count, kGrain, [&](int64_t begin, int64_t end) {
      if (args.is_first) {
        for (int64_t i = begin; i < end; ++i) sum[i] = widen(partial[i]);
      } else {
        for (int64_t i = begin; i < end; ++i) sum[i] += widen(partial[i]);
      }
    });
  });
}

void hidden_gradient(const HiddenGradientArgs& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Scalar = Compute<T>;
    const Scalar* label_gradients = static_cast<const Scalar*>(args.label_gradients);
    parallel_for(0, args.R, rows_per_task(args.H), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (args.positions[i] < 0) continue;
        const T* weight =
            static_cast<const T*>(args.weight) + args.labels[i] * args.weight_stride_v;
        const T* partial = static_cast<const T*>(args.partial) + i * args.H;
        const Scalar* sum =
            args.sum == nullptr ? nullptr : static_cast<const Scalar*>(args.sum) + i * args.H;
        T* dhidden = static_cast<T*>(args.dhidden) + args.positions[i] * args.H;
        for (int64_t h = 0; h < args.H; ++h) {
          const Scalar of_label = label_gradients[i] * widen(weight[h * args.weight_stride_h]);
          const Scalar of_others = widen(partial[h]) + (sum == nullptr ? Scalar(0) : sum[h]);
          dhidden[h] = narrow<T>(of_others + of_label);
        }
      }
    });
  });
}

}  // namespace simpo_ext::cpu
