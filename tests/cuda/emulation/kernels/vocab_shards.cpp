// The kernels of a sharded vocabulary, compared with their specified results and memory accesses.

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "core/kernels.h"
#include "emulator.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/row_batch.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

constexpr uint64_t kLabel = sizeof(int64_t), kDouble = sizeof(double);

template <typename T>
double number(T value) {
  return static_cast<double>(widen(value));
}

// The counters of the last launch.
void require_bytes(const char* what, uint64_t loaded, uint64_t stored) {
  const emulation::Counters got = emulation::read_counters();
  require_equal(static_cast<double>(got.launches), 1, what);
  require_equal(static_cast<double>(got.bytes_loaded), static_cast<double>(loaded), what);
  require_equal(static_cast<double>(got.bytes_stored), static_cast<double>(stored), what);
}

// ---- merge_shards ---------------------------------------------------------------------------

// The rows of a batch in order. With positions, the rows with a token and some more.
template <typename Scalar>
void check_merge(RowBatch& batch, int64_t K, bool has_positions) {
  const SelectedRows rows(batch, static_cast<int64_t>(batch.valid.size()) + 3);
  const Targets targets =
      has_positions ? Targets{rows.labels.data(), {0, 1}, 1, rows.R, batch.ignore_index, false}
                    : batch.targets();
  const int64_t N = targets.B * targets.T;
  describe("%s, %ld rows of %ld shards, positions %d", DTypeOf<Scalar>::name, N, K, has_positions);
  const Buffer<double> shards(K * 3 * N), sum_exp(N);
  const Buffer<Scalar> logps(batch.B * batch.T), max(N);
  const auto shard = [&](int64_t k, int64_t row) { return shards.data() + 3 * k * N + row; };
  std::vector<double> expected(static_cast<size_t>(N));
  for (int64_t row = 0; row < N; ++row) {
    const int64_t label_shard = row % K;
    for (int64_t k = 0; k < K; ++k) {
      shard(k, row)[0] = static_cast<double>(static_cast<Scalar>(batch.normal() + 20.0));
      shard(k, row)[N] = 1.0 + std::fabs(batch.normal());
      shard(k, row)[2 * N] = k == label_shard ? shard(k, row)[0] - 1.0 : kNan;
      if (row % 9 == 1 && k != label_shard) {  // a shard without labels, or all -inf
        shard(k, row)[0] = -kInfinity;
        shard(k, row)[N] = 0.0;
      }
      if (row % 9 == 2 && k == K - 1) shard(k, row)[N] = kNan;
      if (row % 9 == 3) shard(k, row)[2 * N] = kNan;              // a label on no shard
      if (row % 9 == 4 && k == (label_shard + 1) % K && K > 1) {  // a label on two shards
        shard(k, row)[2 * N] = 1.0;
      }
    }
    double largest = -kInfinity, sum = 0.0;
    for (int64_t k = 0; k < K; ++k) largest = std::fmax(largest, shard(k, row)[0]);
    for (int64_t k = 0; k < K; ++k) sum += shard(k, row)[N] * std::exp(shard(k, row)[0] - largest);
    const bool has_one_label = row % 9 != 3 && (row % 9 != 4 || K == 1);
    expected[static_cast<size_t>(row)] =
        has_one_label ? shard(label_shard, row)[2 * N] - largest - std::log(sum) : kNan;
  }
  emulation::read_counters();
  require_equal(cuda::merge_shards({DTypeOf<Scalar>::value, targets, K, shards.data(),
                                    has_positions ? rows.positions.data() : nullptr, logps.data(),
                                    max.data(), sum_exp.data()},
                                   nullptr),
                0, "error of merge_shards");
  uint64_t valid = 0;
  std::vector<bool> is_written(static_cast<size_t>(batch.B * batch.T), !has_positions);
  for (int64_t row = 0; row < N; ++row) {
    if (!targets.is_valid(row / targets.T, row % targets.T)) {
      require_equal(number(max[row]), 0.0, "max of a masked row");
      require_equal(sum_exp[row], 0.0, "sum_exp of a masked row");
      if (!has_positions) require_equal(number(logps[row]), 0.0, "logp of a masked row");
      continue;
    }
    ++valid;
    const int64_t position = has_positions ? rows.positions[row] : row;
    is_written[static_cast<size_t>(position)] = true;
    const double want = expected[static_cast<size_t>(row)];
    require_close(number(logps[position]), want, 2 * kUnit<Scalar> * (1 + std::fabs(want)), "logp");
    double largest = -kInfinity;
    for (int64_t k = 0; k < K; ++k) largest = std::fmax(largest, shard(k, row)[0]);
    require_equal(number(max[row]), largest, "max");
    require(std::isnan(sum_exp[row]) == (row % 9 == 2), "sum_exp", sum_exp[row]);
  }
  for (size_t position = 0; position < is_written.size(); ++position) {
    require(is_written[position] || is_unwritten(logps[static_cast<int64_t>(position)]),
            "only logps of rows are written");
  }
  const uint64_t count = static_cast<uint64_t>(N), per_shard = 3 * kDouble;
  const uint64_t labels =
      has_positions ? count : static_cast<uint64_t>(batch.num_scored_positions());
  require_bytes(
      "merge_shards",
      labels * kLabel +
          valid * (static_cast<uint64_t>(K) * per_shard + (has_positions ? kLabel : 0)),
      count * (kDouble + sizeof(Scalar)) + (has_positions ? valid : count) * sizeof(Scalar));
}

// ---- add_label_shares -----------------------------------------------------------------------

template <typename T>
void check_label_shares(RowBatch& batch, int64_t H, int64_t first_label, int64_t V,
                        TokenStrides weight_strides) {
  using Scalar = Compute<T>;
  const SelectedRows rows(batch, static_cast<int64_t>(batch.valid.size()) + 2);
  describe("%s, H %ld, labels [%ld, %ld) of %ld, weight strides %ld and %ld", DTypeOf<T>::name, H,
           first_label, first_label + V, batch.num_labels, weight_strides.b, weight_strides.t);
  const Buffer<Scalar> gradients(rows.R), sum(rows.R * H, 1);
  const Buffer<T> weight(weight_strides.offset(V - 1, H - 1) + 1, 1);
  batch.fill(gradients.data(), gradients.size());
  batch.fill(weight.data(), weight.size());
  batch.fill(sum.data(), sum.size());
  const std::vector<Scalar> before(sum.data(), sum.data() + sum.size());
  emulation::read_counters();
  require_equal(
      cuda::add_label_shares(
          {DTypeOf<T>::value, H, rows.R, first_label, V, batch.ignore_index, rows.labels.data(),
           gradients.data(), weight.data(), weight_strides.b, weight_strides.t, sum.data()},
          nullptr),
      0, "error of add_label_shares");
  uint64_t shares = 0;
  for (int64_t i = 0; i < rows.R; ++i) {
    const int64_t label = rows.labels[i];
    const bool has_label = i < rows.num_tokens && label >= first_label && label - first_label < V;
    shares += has_label ? 1 : 0;
    for (int64_t h = 0; h < H; ++h) {
      const double old = number(before[static_cast<size_t>(i * H + h)]);
      if (!has_label) {
        require_equal(number(sum[i * H + h]), old, "sum of a label elsewhere");
        continue;
      }
      const double share =
          number(gradients[i]) * number(weight[weight_strides.offset(label - first_label, h)]);
      require_close(number(sum[i * H + h]), old + share,
                    2 * kUnit<Scalar> * (std::fabs(old) + std::fabs(share)), "sum");
    }
  }
  const uint64_t width = static_cast<uint64_t>(H);
  require_bytes("add_label_shares",
                static_cast<uint64_t>(rows.R) * kLabel +
                    shares * (sizeof(Scalar) + width * (sizeof(T) + sizeof(Scalar))),
                shares * width * sizeof(Scalar));
}

// ---- scatter_rows ---------------------------------------------------------------------------

template <typename T>
void check_scatter(RowBatch& batch, int64_t H) {
  using Scalar = Compute<T>;
  const SelectedRows rows(batch, static_cast<int64_t>(batch.valid.size()) + 2);
  describe("%s, H %ld, %ld rows", DTypeOf<T>::name, H, rows.R);
  const Buffer<Scalar> from(rows.R * H, 1);
  batch.fill(from.data(), from.size());
  const Buffer<T> to(batch.B * batch.T * H, 1);
  emulation::read_counters();
  require_equal(
      cuda::scatter_rows(
          {DTypeOf<T>::value, H, rows.R, rows.positions.data(), from.data(), to.data()}, nullptr),
      0, "error of scatter_rows");
  std::vector<bool> is_written(static_cast<size_t>(batch.B * batch.T));
  for (int64_t i = 0; i < rows.num_tokens; ++i) {
    is_written[static_cast<size_t>(rows.positions[i])] = true;
    for (int64_t h = 0; h < H; ++h) {
      require_equal(number(to[rows.positions[i] * H + h]), number(narrow<T>(from[i * H + h])),
                    "element of a scattered row");
    }
  }
  for (size_t position = 0; position < is_written.size(); ++position) {
    for (int64_t h = 0; h < H && !is_written[position]; ++h) {
      require(is_unwritten(to[static_cast<int64_t>(position) * H + h]),
              "only rows with a token are written");
    }
  }
  const uint64_t tokens = static_cast<uint64_t>(rows.num_tokens), width = static_cast<uint64_t>(H);
  require_bytes("scatter_rows",
                static_cast<uint64_t>(rows.R) * kLabel + tokens * width * sizeof(Scalar),
                tokens * width * sizeof(T));
}

}  // namespace

void check_vocab_shards(bool reduced) {
  // With and without a shift; with an ignore_index outside the vocabulary, or inside.
  for (uint64_t seed = 3600; seed < (reduced ? 3602 : 3606); ++seed) {
    RowBatch batch(3, 47, 50, seed);
    for (const int64_t K : {1, 2, 3, 8}) {
      for (const bool has_positions : {false, true}) {
        check_merge<float>(batch, K, has_positions);
        check_merge<double>(batch, K, has_positions);
      }
    }
  }
  // More blocks than kMaxGridX.
  RowBatch many(1, reduced ? 200 : 65 * 128 + 1, 50, 3606);
  check_merge<float>(many, 2, false);
  for_each_dtype([&](auto, auto element) {
    using T = decltype(element);
    for (uint64_t seed = 3610; seed < 3613; ++seed) {
      RowBatch batch(2, 23, 50, seed);
      // One element; fewer than the threads of a block; more.
      for (const int64_t H : {1, 33, 300}) {
        if (reduced && H == 300 && seed > 3610) continue;
        check_label_shares<T>(batch, H, 0, 50, {H, 1});
        check_label_shares<T>(batch, H, 17, 20, {H + 1, 1});
        check_label_shares<T>(batch, H, 37, 13, {1, 13});
        check_scatter<T>(batch, H);
      }
    }
  });
}

}  // namespace simpo_ext::kernel_tests
