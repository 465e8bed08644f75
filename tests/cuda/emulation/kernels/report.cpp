// The report of token_logps, for the whole vocabulary and in parts, compared with the direct
// computation. Also: the other outputs have the same bits as without a report, and which rows it
// reads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/kernels.h"
#include "core/row_report.h"
#include "emulator.h"
#include "kernels/agreement.h"
#include "kernels/buffers.h"
#include "kernels/parts.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

// mean_logit and entropy in double, and the errors that are allowed.
template <typename Logit>
class ReportTruth {
 public:
  using Scalar = Compute<Logit>;

  ReportTruth(const Logit* x, int64_t V, LogitTransform transform) {
    std::vector<double> z;
    double max = -kInfinity, size = 0.0;
    long double total = 0.0;
    for (int64_t v = 0; v < V; ++v) {
      const double scaled = static_cast<double>(widen(x[v])) * transform.logit_scale;
      z.push_back(transform.softcap == 0.0
                      ? scaled
                      : transform.softcap * std::tanh(scaled / transform.softcap));
      max = std::max(max, z.back());
      total += z.back();
      size += std::fabs(z.back()) / static_cast<double>(V);
    }
    mean = static_cast<double>(total / static_cast<long double>(V));
    const bool is_exact = transform.logit_scale == 1.0 && transform.softcap == 0.0;
    const double z_error = is_exact ? 0.0 : 6 * kUnit<Scalar> * std::max(transform.softcap, 1.0);
    // Additions of a few distances from the largest z, whose magnitude may exceed that of any z.
    mean_error = 16 * kUnit<Scalar> * 2 * (size + std::fabs(max)) + z_error * (1 + size);
    if (!std::isfinite(max) || std::isnan(mean)) return;

    long double sum = 0.0, sum_z = 0.0;
    for (const double z_v : z) sum += std::exp(z_v - max);
    for (const double z_v : z) {
      if (z_v == -kInfinity) continue;
      sum_z += std::exp(z_v - max) * (z_v - max);
    }
    entropy = static_cast<double>(std::log(sum) - sum_z / sum);
    entropy_error = 16 * kUnit<Scalar> * (1 + entropy);
    for (const double z_v : z) {
      const double p = std::exp(z_v - max) / static_cast<double>(sum), distance = max - z_v;
      if (p == 0.0) continue;
      // The error of a term: that of its exp and those of its two arguments.
      const double relative =
          (4 + 3 * distance) * kUnit<Scalar> + z_error * (2 + std::fabs(z_v) + std::fabs(max));
      entropy_error += p * relative * (2 + distance + entropy);
    }
  }

  double mean = 0.0, mean_error = 0.0, entropy = kNan, entropy_error = 0.0;
};

template <typename Logit>
void require_mean(double got, const ReportTruth<Logit>& truth) {
  if (!std::isfinite(truth.mean)) {
    // With NaN or +inf among the z it is one of them; with -inf among other finite z it is -inf.
    require(!std::isfinite(got), "mean_logit of a row that is not finite", got, truth.mean);
    require(truth.mean != -kInfinity || got == -kInfinity, "mean_logit of a row with -inf", got);
    return;
  }
  // The sum of a few such logits exceeds the range of Scalar.
  const double largest = static_cast<double>(std::numeric_limits<Compute<Logit>>::max()) / 1e5;
  if (got == -kInfinity && truth.mean < -largest) return;
  require_close(got, truth.mean, truth.mean_error, "mean_logit");
}

template <typename Logit>
void check_batch(const TokenBatch<Logit>& batch, bool all_positions) {
  using Scalar = Compute<Logit>;
  const int64_t N = batch.shape.B * batch.shape.T;
  require_equal(cuda::token_logps(batch.forward_args(), nullptr), 0, "error without a report");
  const Buffer<Scalar> logps(N), max(N);
  const Buffer<double> sum_exp(N), mean_logit(N), entropy(N);
  TokenLogpsArgs args = batch.unshared_forward_args();
  args.logps = logps.data();
  args.max = max.data();
  args.sum_exp = sum_exp.data();
  args.mean_logit = mean_logit.data();
  args.entropy = entropy.data();
  args.all_positions = all_positions;
  const auto is_read = [&](int64_t b, int64_t t) {
    return batch.is_scored(b, t) || (all_positions && batch.is_masked(b, t));
  };
  batch.logits.forbid_reads_unless(is_read);
  emulation::read_counters();
  require_equal(cuda::token_logps(args, nullptr), 0, "error of the forward");
  const emulation::Counters cost = emulation::read_counters();
  batch.logits.permit_reads();
  require_same_bits(logps.data(), batch.logps.data(), N, "logps with a report");
  require_same_bits(max.data(), batch.max.data(), N, "max with a report");
  require_same_bits(sum_exp.data(), batch.sum_exp.data(), N, "sum_exp with a report");

  uint64_t loaded = 0;
  int64_t row = 0;
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
    const double mean = mean_logit[row], nats = entropy[row];
    ++row;
    if (batch.has_label(t)) loaded += sizeof(int64_t);
    if (is_read(b, t)) loaded += static_cast<uint64_t>(batch.shape.V) * sizeof(Logit);
    if (batch.is_scored(b, t)) loaded += sizeof(Logit);
    if (!batch.is_masked(b, t) && !batch.is_scored(b, t)) {
      require(std::isnan(mean) && std::isnan(nats), "a label out of range is reported as NaN");
      return;
    }
    const ReportTruth<Logit> truth(x, batch.shape.V, batch.transform);
    if (is_read(b, t)) {
      require_mean(mean, truth);
    } else {
      require_equal(mean, 0.0, "mean_logit of a masked row");
    }
    if (batch.is_masked(b, t)) {
      require_equal(nats, 0.0, "entropy of a masked row");
    } else {
      require_close(nats, truth.entropy, truth.entropy_error, "entropy");
      require(!(nats < 0.0), "no entropy is negative", nats);
    }
  });
  const uint64_t stored = 2 * sizeof(Scalar) + 3 * sizeof(double);
  require_equal(static_cast<double>(cost.launches), 1, "launches");
  require_equal(static_cast<double>(cost.bytes_loaded), static_cast<double>(loaded),
                "bytes loaded");
  require_equal(static_cast<double>(cost.bytes_stored),
                static_cast<double>(static_cast<uint64_t>(N) * stored), "bytes stored");
}

// Rows whose first part is -inf. With all positions, the sums are over all parts.
template <typename Logit>
void check_parts(const TokenBatch<Logit>& batch, const Cuts& cuts) {
  using Scalar = Compute<Logit>;
  const int64_t N = batch.shape.B * batch.shape.T;
  const Buffer<Scalar> max(N), label_z(N);
  const Buffer<double> sum_exp(N), sum_z(N), sum_exp_z(N);
  int64_t row = 0;
  batch.logits.for_each_row([&](int64_t, int64_t, Logit* x) {
    if (row++ % 3 == 1) {
      std::fill_n(x, cuts[1], narrow<Logit>(static_cast<Scalar>(-kInfinity)));
    }
  });
  for (size_t part = 0; part + 1 < cuts.size(); ++part) {
    TokenLogpsArgs args = forward_args(batch, cuts, part, max, sum_exp, label_z);
    args.mean_logit = sum_z.data();
    args.entropy = sum_exp_z.data();
    args.all_positions = true;
    require_equal(cuda::token_logps(args, nullptr), 0, "error of a part");
  }
  row = 0;
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
    const RowReport report{sum_z[row], sum_exp_z[row]};
    const double sum = sum_exp[row];
    ++row;
    if (!batch.is_masked(b, t) && !batch.is_scored(b, t)) {
      require(std::isnan(report.sum_z) && std::isnan(report.sum_exp_z), "NaN of a part");
      return;
    }
    const ReportTruth<Logit> truth(x, batch.shape.V, batch.transform);
    require_mean(report.sum_z / static_cast<double>(batch.shape.V), truth);
    if (batch.is_masked(b, t)) {
      require_equal(report.sum_exp_z, 0.0, "sum_exp_z of a masked row");
    } else {
      require_close(report.entropy(sum), truth.entropy, 2 * truth.entropy_error, "entropy");
    }
  });
}

template <typename Logit>
void check_of(bool reduced) {
  constexpr LogitTransform kTransforms[] = {{1.0, 0.0}, {0.7, 0.0}, {1.0, 20.0}};
  uint64_t seed = 6000;
  // One label; a vector and its edges; several vectors; the large block, and several turns of it.
  for (const int64_t V : {1, 9, 64, 1025, 8193, 20001}) {
    if (reduced && V > 2000) continue;
    for (const LogitTransform& transform : kTransforms) {
      if (reduced && V > 64 && transform.softcap == 0.0) continue;
      // 21 rows contain every kind.
      const Shape shape{V < 100 ? 4 : 2, V < 100 && !reduced ? 17 : 11, V};
      const Layout layout{static_cast<int64_t>(seed % 3), static_cast<int64_t>(seed % 2), 0};
      describe("%s, V %ld, logits from element %ld, scale %g, softcap %g, seed %lu",
               DTypeOf<Logit>::name, V, layout.front, transform.logit_scale, transform.softcap,
               seed);
      const TokenBatch<Logit> batch(shape, layout, transform, seed % 2 == 1, seed);
      check_batch(batch, false);
      check_batch(batch, true);
      for (const int64_t width : {(V + 1) / 2, int64_t{24}}) {
        if (width < V && V / width < 50) check_parts(batch, cuts_of(V, width));
      }
      seed += 7;
    }
  }
}

}  // namespace

void check_report(bool reduced) {
  for_each_dtype([&](auto, auto logit) { check_of<decltype(logit)>(reduced); });
}

}  // namespace simpo_ext::kernel_tests
