// token_logps and its gradient, in separate memory and in place, compared with the direct
// computation.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <vector>

#include "core/kernels.h"
#include "kernels/agreement.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

template <typename T>
std::vector<unsigned char> copy_of(const Rows<T>& rows) {
  const unsigned char* bytes = rows.buffer().bytes();
  return std::vector<unsigned char>(bytes, bytes + rows.buffer().num_bytes());
}

template <typename T>
bool has_bytes(const Rows<T>& rows, const std::vector<unsigned char>& bytes) {
  return bytes.empty() || std::memcmp(rows.buffer().bytes(), bytes.data(), bytes.size()) == 0;
}

template <typename Logit>
void check_forward(const TokenBatch<Logit>& batch) {
  const std::vector<unsigned char> before = copy_of(batch.logits);
  batch.logits.forbid_reads_unless([&](int64_t b, int64_t t) { return !batch.is_masked(b, t); });
  require_equal(cuda::token_logps(batch.forward_args(), nullptr), 0, "error of the forward");
  batch.logits.permit_reads();
  require(has_bytes(batch.logits, before), "the forward does not write the logits");

  int64_t row = 0;
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
    const double logp = static_cast<double>(batch.logps[row]);
    const double max = static_cast<double>(batch.max[row]);
    const double sum_exp = batch.sum_exp[row];
    ++row;
    if (batch.is_masked(b, t)) {
      require_equal(logp, 0.0, "logp of a masked row");
      require_equal(max, 0.0, "max of a masked row");
      require_equal(sum_exp, 0.0, "sum_exp of a masked row");
      return;
    }
    const RowTruth<Logit> truth(x, batch.shape.V, batch.label(b, t), batch.transform);
    require_close(logp, truth.logp(), truth.logp_error(), "logp");
    if (truth.is_nan()) return;
    require_close(max, truth.max(), truth.max_error(), "max");
    require_close((max - truth.max()) + std::log(sum_exp), truth.log_sum_exp(),
                  truth.log_sum_exp_error(), "max + log(sum_exp)");
  });
}

// A row's bits do not depend on the number of blocks that work on it.
template <typename Logit>
void check_sharing(const TokenBatch<Logit>& batch) {
  using Scalar = Compute<Logit>;
  const int64_t N = batch.shape.B * batch.shape.T;
  const Buffer<Scalar> logps(N), max(N);
  const Buffer<double> sum_exp(N);
  TokenLogpsArgs args = batch.unshared_forward_args();
  args.logps = logps.data();
  args.max = max.data();
  args.sum_exp = sum_exp.data();
  require_equal(cuda::token_logps(args, nullptr), 0, "error with a block for each row");
  require_same_bits(logps.data(), batch.logps.data(), N, "logps of one block, and of several");
  require_same_bits(max.data(), batch.max.data(), N, "max of one block, and of several");
  require_same_bits(sum_exp.data(), batch.sum_exp.data(), N,
                    "sum_exp of one block, and of several");
}

template <typename Logit>
void check_gradient(const TokenBatch<Logit>& batch, const Rows<Logit>& dlogits) {
  using Scalar = Compute<Logit>;
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
    const Logit* dx = dlogits.row(b, t);
    const int64_t V = batch.shape.V;
    const Scalar grad = batch.grad(b, t);
    // A row with a bad label is NaN. Its gradient is not checked where the incoming gradient is 0,
    // since the contracts leave that open.
    if (batch.is_masked(b, t) || (batch.is_scored(b, t) && grad == Scalar(0))) {
      for (int64_t v = 0; v < V; ++v) {
        require_equal(static_cast<double>(widen(dx[v])), 0.0, "dlogits without a gradient");
      }
      return;
    }
    const RowTruth<Logit> truth(x, V, batch.label(b, t), batch.transform);
    const double g = static_cast<double>(grad);
    for (int64_t v = 0; v < V; ++v) {
      const double got = static_cast<double>(widen(dx[v]));
      const double expected = truth.gradient(v, g);
      if (is_close(got, expected, truth.gradient_error(v, g))) continue;
      std::fprintf(stderr, "b %ld, t %ld, v %ld, label %ld, grad %g\n", b, t, v, batch.label(b, t),
                   g);
      fail("dlogits", got, expected);
    }
  });
}

template <typename Logit>
void check_case(Shape shape, Layout in, Layout out, LogitTransform transform, bool shift,
                uint64_t seed) {
  describe(
      "%s, B %ld, T %ld, V %ld, logits from element %ld with gaps of %ld and %ld, dlogits from %ld "
      "with %ld and %ld, scale %g, softcap %g, shift %d, seed %lu",
      DTypeOf<Logit>::name, shape.B, shape.T, shape.V, in.front, in.pad_t, in.pad_b, out.front,
      out.pad_t, out.pad_b, transform.logit_scale, transform.softcap, shift, seed);
  const TokenBatch<Logit> batch(shape, in, transform, shift, seed);
  check_forward(batch);
  if (batch.num_segments > 0) check_sharing(batch);

  const Rows<Logit> dlogits(shape.B, shape.T, shape.V, out);
  const std::vector<unsigned char> before = copy_of(batch.logits);
  batch.logits.forbid_reads_unless([&](int64_t b, int64_t t) {
    return batch.has_gradient(b, t) || (!batch.is_masked(b, t) && !batch.is_scored(b, t));
  });
  require_equal(cuda::token_logps_backward(batch.backward_args(dlogits), nullptr), 0,
                "error of the backward");
  batch.logits.permit_reads();
  require(has_bytes(batch.logits, before), "the backward does not write the logits");
  require(dlogits.are_gaps_unwritten(), "the backward writes only rows");
  check_gradient(batch, dlogits);

  require_equal(cuda::token_logps_backward(batch.in_place_args(), nullptr), 0,
                "error of the backward in place");
  const size_t row_bytes = static_cast<size_t>(shape.V) * sizeof(Logit);
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* dx) {
    require(std::memcmp(dx, dlogits.row(b, t), row_bytes) == 0, "in place gives the same bits");
  });
  size_t at = 0;
  batch.logits.for_each_gap([&](const unsigned char* bytes, size_t count) {
    at = static_cast<size_t>(bytes - batch.logits.buffer().bytes());
    require(count == 0 || std::memcmp(bytes, before.data() + at, count) == 0,
            "in place, only rows are written");
  });
}

constexpr LogitTransform kTransforms[] = {{1.0, 0.0}, {0.7, 0.0},  {1.0, 20.0},
                                          {1.0, 0.0}, {1.5, 12.0}, {3.0, 0.0}};

// Vocabularies below a few vectors: every start of a row, and more rows than kMaxGridX.
//   1, 2    nothing but the label; a row shorter than what lies before the first boundary
//   7, 8, 9 a vector of 2-byte logits, and one element more and less
//   63, 64  several vectors and both ends; rows that stay aligned
constexpr int64_t kSmall[] = {1, 2, 7, 8, 9, 63, 64};
//   1023, 1025  one vector a thread in 128 threads, and one element off either way
//   2049   above 16384 bytes in float64, where a larger block takes over; an odd row
//   5003   a prime; several rounds of the smaller block for 2 bytes
//   8192   exactly 32768 bytes for float32, where a larger block takes over; all rows aligned
//   20001  several rounds of every block, and an incomplete one; two segments for 4 bytes, shared
//   33000  two segments for 2-byte logits, the second one short; five for float64, shared by three
//          blocks
constexpr int64_t kLarge[] = {1023, 1025, 2049, 5003, 8192, 20001, 33000};

template <typename Logit>
void check_sizes(bool reduced) {
  const int64_t width = 16 / static_cast<int64_t>(sizeof(Logit));
  uint64_t seed = 0;
  const auto check_layouts = [&](Shape shape, int64_t front) {
    // Every row has the alignment of the first.
    const int64_t to_boundary = (width - shape.V % width) % width;
    const struct {
      Layout in, out;
    } layouts[] = {
        // Both contiguous.
        {{front, 0, 0}, {front, 0, 0}},
        // Aligned alike at different strides.
        {{front, to_boundary, 0}, {front, to_boundary + 2 * width, 5 * width}},
        // Gaps everywhere, and different alignments in most rows.
        {{front, 1, 3}, {(front + 1) % width, 2, 0}},
    };
    for (const auto& layout : layouts) {
      const LogitTransform transform = kTransforms[(seed + seed / 7) % std::size(kTransforms)];
      check_case<Logit>(shape, layout.in, layout.out, transform, seed / 2 % 2 == 1, seed);
      ++seed;
    }
  };
  for (const int64_t V : kSmall) {
    if (reduced && V != 1 && V != 9 && V != 64) continue;
    for (int64_t front = 0; front < width; ++front) {
      if (reduced && front != 0 && front != width - 1) continue;
      check_layouts({5, 15, V}, front);
    }
  }
  for (const int64_t V : kLarge) {
    if (reduced && V != 1025 && V != 8192) continue;
    check_layouts({2, 11, V}, 0);
    if (!reduced) check_layouts({2, 11, V}, 3 % width);
  }

  // Three segments, shared by two blocks; and rows of two segments, too many rows for sharing.
  if (!reduced || sizeof(Logit) == 8) {
    check_case<Logit>({2, 15, 2 * 65536 / static_cast<int64_t>(sizeof(Logit)) + 1}, {1, 0, 0},
                      {1, 0, 0}, kTransforms[0], true, seed++);
  }
  if (!reduced) {
    check_case<Logit>({3, 23, 65536 / static_cast<int64_t>(sizeof(Logit)) + 5}, {1, 0, 0},
                      {1, 0, 0}, kTransforms[0], false, seed++);
  }

  // No rows, or no columns.
  for (const Shape& shape : {Shape{0, 5, 9}, Shape{5, 0, 9}, Shape{5, 15, 0}, Shape{0, 0, 0}}) {
    check_case<Logit>(shape, {}, {}, kTransforms[0], seed % 2 == 0, seed);
    ++seed;
  }
}

}  // namespace

void check_values(bool reduced) {
  for_each_dtype([&](auto, auto logit) { check_sizes<decltype(logit)>(reduced); });
}

}  // namespace simpo_ext::kernel_tests
