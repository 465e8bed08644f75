// token_logps and its gradient, one part of the vocabulary after another. Compared with the direct
// computation and, where the bits must be the same, with one call for the whole vocabulary.

#include "kernels/parts.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/kernels.h"
#include "core/logsumexp.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

template <typename Logit>
class PartsCheck {
 public:
  using Scalar = Compute<Logit>;

  PartsCheck(const TokenBatch<Logit>& batch, const Cuts& cuts, Layout out)
      : batch_(batch),
        cuts_(cuts),
        N_(batch.shape.B * batch.shape.T),
        max_(N_),
        sum_exp_(N_),
        label_z_(N_),
        label_gradients_(N_),
        dlogits_(batch.shape.B, batch.shape.T, batch.shape.V, out) {}

  void forward() {
    require_equal(cuda::token_logps(batch_.forward_args(), nullptr), 0, "error of all at once");
    for (size_t part = 0; part + 1 < cuts_.size(); ++part) {
      require_equal(
          cuda::token_logps(forward_args(batch_, cuts_, part, max_, sum_exp_, label_z_), nullptr),
          0, "error of a part's forward");
      for_each_token([&](int64_t b, int64_t t, int64_t row) {
        const double label_z = static_cast<double>(label_z_[row]);
        if (batch_.is_masked(b, t)) {
          require_equal(label_z, 0.0, "label_z of a masked row");
          require_equal(static_cast<double>(max_[row]), 0.0, "max of a masked row");
          require_equal(sum_exp_[row], 0.0, "sum_exp of a masked row");
        } else if (!batch_.is_scored(b, t)) {
          require(std::isnan(label_z), "label_z of a label out of range", label_z, kNan);
          require(std::isnan(max_[row]), "max of a label out of range");
          require(std::isnan(sum_exp_[row]), "sum_exp of a label out of range");
        } else if (batch_.label(b, t) >= cuts_[part + 1]) {
          require(std::isnan(label_z), "label_z before its part", label_z, kNan);
        }
      });
    }
    for_each_token([&](int64_t b, int64_t t, int64_t row) {
      if (!batch_.is_scored(b, t)) return;
      const RowTruth<Logit> truth(batch_.logits.row(b, t), batch_.shape.V, batch_.label(b, t),
                                  batch_.transform);
      const LogSumExp<Scalar> sum{max_[row], sum_exp_[row]};
      const Scalar logp = static_cast<Scalar>(sum.log_probability(label_z_[row]));
      require_close(static_cast<double>(logp), truth.logp(), 2 * truth.logp_error(), "logp");
      if (truth.is_nan()) return;
      require(max_[row] == batch_.max[row], "max", static_cast<double>(max_[row]),
              static_cast<double>(batch_.max[row]));
      require_close(sum_exp_[row], batch_.sum_exp[row],
                    2 * truth.log_sum_exp_error() * batch_.sum_exp[row], "sum_exp");
    });
  }

  void backward() {
    for (size_t part = 0; part + 1 < cuts_.size(); ++part) {
      run_backward(part, dlogits_);
      for_each_token([&](int64_t b, int64_t t, int64_t row) {
        const bool is_written = batch_.is_scored(b, t) && batch_.label(b, t) < cuts_[part + 1];
        require(is_unwritten(label_gradients_[row]) != is_written,
                "label_gradients are written by the label's part");
      });
    }
    require(dlogits_.are_gaps_unwritten(), "the backward writes only rows");
    for_each_token([&](int64_t b, int64_t t, int64_t row) { check_gradient(b, t, row); });
  }

  // Call after backward(), which must have given the same bits.
  void backward_in_place() {
    const std::vector<Scalar> expected(label_gradients_.data(), label_gradients_.data() + N_);
    for (size_t part = 0; part + 1 < cuts_.size(); ++part) run_backward(part, batch_.logits);
    const size_t row_bytes = static_cast<size_t>(batch_.shape.V) * sizeof(Logit);
    for_each_token([&](int64_t b, int64_t t, int64_t row) {
      require(std::memcmp(batch_.logits.row(b, t), dlogits_.row(b, t), row_bytes) == 0,
              "in place gives the same bits");
      require(std::memcmp(&label_gradients_[row], &expected[static_cast<size_t>(row)],
                          sizeof(Scalar)) == 0,
              "in place gives the same label_gradients");
    });
  }

 private:
  template <typename Function>
  void for_each_token(const Function& function) const {
    for (int64_t row = 0; row < N_; ++row) {
      function(row / batch_.shape.T, row % batch_.shape.T, row);
    }
  }

  void run_backward(size_t part, const Rows<Logit>& to) const {
    require_equal(
        cuda::token_logps_backward(
            backward_args(batch_, cuts_, part, max_, sum_exp_, to, label_gradients_), nullptr),
        0, "error of a part's backward");
  }

  void check_gradient(int64_t b, int64_t t, int64_t row) const {
    const int64_t label = batch_.label(b, t);
    const double g = static_cast<double>(batch_.grad(b, t));
    const bool is_zero = batch_.is_masked(b, t) || (batch_.is_scored(b, t) && g == 0.0);
    const RowTruth<Logit> truth(batch_.logits.row(b, t), batch_.shape.V, label, batch_.transform);
    for (int64_t v = 0; v < batch_.shape.V; ++v) {
      const double got = static_cast<double>(widen(dlogits_.row(b, t)[v]));
      if (is_zero || (batch_.is_scored(b, t) && v == label)) {
        require_equal(got, 0.0, "dlogits of a label, or without a gradient");
      } else {
        require_close(got, truth.gradient(v, g), 2 * truth.gradient_error(v, g), "dlogits");
      }
    }
    if (!batch_.is_scored(b, t)) return;
    const double got = static_cast<double>(label_gradients_[row]);
    if (is_zero) {
      require_equal(got, 0.0, "label_gradients without a gradient");
      return;
    }
    // Not rounded to the precision of a logit.
    const double expected = truth.gradient(label, g);
    const double rounding = truth.is_nan() ? 0.0 : 1.01 * half_ulp<Logit>(expected);
    const double error = truth.gradient_error(label, g) - rounding;
    require_close(got, expected, 2 * error + 2 * half_ulp<Scalar>(expected), "label_gradients");
  }

  const TokenBatch<Logit>& batch_;
  const Cuts& cuts_;
  const int64_t N_;
  const Buffer<Scalar> max_;
  const Buffer<double> sum_exp_;
  const Buffer<Scalar> label_z_, label_gradients_;
  const Rows<Logit> dlogits_;
};

// In some rows the first part is all -inf, or all except the label. In others the last part has a
// NaN.
template <typename Logit>
void put_infinities(const TokenBatch<Logit>& batch, const Cuts& cuts) {
  using Scalar = Compute<Logit>;
  int64_t row = 0;
  batch.logits.for_each_row([&](int64_t b, int64_t t, Logit* x) {
    if (row % 3 == 1) {
      for (int64_t v = 0; v < cuts[1]; ++v) {
        if (v != batch.label(b, t)) x[v] = narrow<Logit>(static_cast<Scalar>(-kInfinity));
      }
    } else if (row % 7 == 2) {
      x[cuts[cuts.size() - 2]] = narrow<Logit>(static_cast<Scalar>(kNan));
    }
    ++row;
  });
}

template <typename Logit>
void check_case(Shape shape, const Cuts& cuts, Layout in, Layout out, LogitTransform transform,
                uint64_t seed) {
  describe(
      "%s, B %ld, T %ld, V %ld in %zu parts of %ld, logits from %ld, scale %g, softcap %g, "
      "seed %lu",
      DTypeOf<Logit>::name, shape.B, shape.T, shape.V, cuts.size() - 1, cuts[1] - cuts[0], in.front,
      transform.logit_scale, transform.softcap, seed);
  const TokenBatch<Logit> batch(shape, in, transform, seed % 2 == 1, seed);
  if (seed % 4 >= 2) put_infinities(batch, cuts);
  PartsCheck<Logit> check(batch, cuts, out);
  check.forward();
  check.backward();
  check.backward_in_place();
}

template <typename Logit>
void check_parts_of(bool reduced) {
  constexpr LogitTransform kTransforms[] = {{1.0, 0.0}, {0.7, 0.0}, {1.0, 20.0}};
  uint64_t seed = 4000;
  for (const int64_t V : {int64_t{1}, int64_t{9}, int64_t{64}, int64_t{1025}, int64_t{20001}}) {
    // One part, one label, halves, aligned parts, and parts for the large block.
    for (const int64_t width : {V, int64_t{1}, (V + 1) / 2, int64_t{24}, int64_t{8192}}) {
      const bool is_done = width > V || V / width > 50;
      if (is_done || (reduced && (V > 2000 || (V > 64 && width < 100)))) continue;
      const Cuts cuts = cuts_of(V, width);
      for (int repeat = 0; repeat < (reduced ? 2 : 4); ++repeat) {
        const Shape shape{V < 100 && !reduced ? 5 : 2, V < 100 ? 15 : 11, V};
        const Layout out = repeat % 2 == 0 ? Layout{seed % 2 == 0 ? 0 : 1, 0, 0} : Layout{0, 3, 0};
        const Layout in{repeat % 2 == 0 ? out.front : 1, 0, 0};
        check_case<Logit>(shape, cuts, in, out, kTransforms[seed % 3], seed);
        seed += 5;
      }
    }
  }
}

}  // namespace

void check_parts(bool reduced) {
  for_each_dtype([&](auto, auto logit) { check_parts_of<decltype(logit)>(reduced); });
}

}  // namespace simpo_ext::kernel_tests
