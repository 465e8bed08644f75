// The kernels around the logits of hidden states, compared with their specified results.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/row_batch.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

template <typename T>
double number(T value) {
  return static_cast<double>(widen(value));
}

// ---- select_tokens --------------------------------------------------------------------------

template <typename Scalar>
void check_selection(const RowBatch& batch, int64_t R, bool has_logps) {
  const int64_t N = batch.B * batch.T;
  const Buffer<int64_t> positions(R), labels(R);
  const Buffer<Scalar> logps(N);
  require_equal(
      cuda::select_tokens({batch.targets(), batch.num_labels, R, positions.data(), labels.data(),
                           DTypeOf<Scalar>::value, has_logps ? logps.data() : nullptr},
                          nullptr),
      0, "error of select_tokens");
  const SelectedRows expected(batch, R);
  for (int64_t i = 0; i < R; ++i) {
    require(positions[i] == expected.positions[i], "position", static_cast<double>(positions[i]),
            static_cast<double>(expected.positions[i]));
    require(labels[i] == expected.labels[i], "label", static_cast<double>(labels[i]),
            static_cast<double>(expected.labels[i]));
  }
  for (int64_t i = 0; i < N; ++i) {
    const bool is_valid = batch.targets().is_valid(i / batch.T, i % batch.T);
    if (has_logps) {
      require_close(number(logps[i]), is_valid ? kNan : 0.0, 0.0, "logp of a token selected from");
    } else {
      require(is_unwritten(logps[i]), "no logps are written");
    }
  }
}

void check_selections(bool reduced) {
  uint64_t seed = 3000;
  // Nothing; less than a warp; a turn of the block, and one more; odd and even numbers of turns.
  for (const int64_t num_positions : {0, 1, 9, 31, 1365, 1366, 2731, 5000}) {
    if (reduced && num_positions > 1366) continue;
    for (int repeat = 0; repeat < (reduced ? 1 : 4); ++repeat) {
      const RowBatch batch(3, num_positions, 50, seed);
      const int64_t num_valid = static_cast<int64_t>(batch.valid.size());
      describe("B 3, T %ld, %ld valid, seed %lu", num_positions, num_valid, seed);
      for (const int64_t R : {num_valid, num_valid / 2, num_valid + 1, 3 * num_positions + 1500}) {
        check_selection<float>(batch, R, true);
        check_selection<double>(batch, R, false);
        if (R > num_valid) check_selection<double>(batch, R, true);
      }
      check_selection<float>(batch, 0, true);
      check_selection<float>(batch, 0, false);
      ++seed;
    }
  }
}

// ---- gather_rows ----------------------------------------------------------------------------

template <typename T>
void check_gather(const RowBatch& batch, const SelectedRows& rows, int64_t H, Layout layout,
                  int64_t front, bool has_gradients) {
  describe(
      "%s, H %ld, R %ld, source from element %ld with gaps of %ld and %ld, rows from %ld, "
      "gradients %d",
      DTypeOf<T>::name, H, rows.R, layout.front, layout.pad_t, layout.pad_b, front, has_gradients);
  const Rows<T> source(batch.B, batch.T, H, layout);
  source.for_each_row([&](int64_t b, int64_t t, T* x) {
    for (int64_t h = 0; h < H; ++h) {
      x[h] = narrow<T>(static_cast<Compute<T>>((b * batch.T + t) % 50 + 0.5 * (h % 3) + 1));
    }
  });
  // Every third row has a gradient of 0, one of them -0.
  const Buffer<Compute<T>> gradients(rows.R);
  for (int64_t i = 0; i < rows.R; ++i) {
    gradients[i] = static_cast<Compute<T>>(i % 3 == 1 ? (i == 4 ? -0.0 : 0.0) : 0.5 - i);
  }
  const auto has_part = [&](int64_t i) {
    return rows.positions[i] >= 0 && (!has_gradients || i % 3 != 1);
  };
  std::vector<bool> is_row(static_cast<size_t>(batch.B * batch.T));
  for (int64_t i = 0; i < rows.num_tokens; ++i) {
    is_row[static_cast<size_t>(rows.positions[i])] = has_part(i);
  }
  source.forbid_reads_unless(
      [&](int64_t b, int64_t t) { return is_row[static_cast<size_t>(b * batch.T + t)]; });
  const Buffer<T> result(rows.R * H, front);
  require_equal(cuda::gather_rows(
                    {DTypeOf<T>::value, batch.T, H, rows.R, rows.positions.data(), source.data(),
                     source.strides(), result.data(), has_gradients ? gradients.data() : nullptr},
                    nullptr),
                0, "error of gather_rows");
  source.permit_reads();
  for (int64_t i = 0; i < rows.R; ++i) {
    const int64_t position = rows.positions[i];
    for (int64_t h = 0; h < H; ++h) {
      const double expected =
          has_part(i) ? number(source.row(position / batch.T, position % batch.T)[h]) : 0.0;
      require_equal(number(result[i * H + h]), expected, "element of a gathered row");
    }
  }
  for (int64_t i = -front; i < 0; ++i) require(is_unwritten(result[i]), "only rows are written");
}

template <typename T>
void check_gathers(bool reduced) {
  constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(T));
  const RowBatch batch(3, 47, 50, 3100);
  const RowBatch small(2, 9, 50, 3101);
  // One element; a vector and one more; several vectors and elements; several rounds of the block.
  for (const int64_t H : {int64_t{1}, int64_t{2}, kWidth, kWidth + 1, 7 * kWidth + 3, 512 * kWidth,
                          700 * kWidth + 1}) {
    const RowBatch& tokens = H > 100 * kWidth || (reduced && H != kWidth + 1) ? small : batch;
    const int64_t num_valid = static_cast<int64_t>(tokens.valid.size());
    const SelectedRows rows(tokens, num_valid + 3);
    const int64_t to_boundary = (kWidth - H % kWidth) % kWidth;
    check_gather<T>(tokens, rows, H, {0, to_boundary, 0}, 0, true);
    check_gather<T>(tokens, rows, H, {1, 0, 0}, 1, false);
    if (reduced) continue;
    check_gather<T>(tokens, rows, H, {kWidth - 1, 1, 3}, 1 % kWidth, true);
    check_gather<T>(tokens, rows, H, {0, to_boundary, kWidth}, 1, false);
    check_gather<T>(tokens, SelectedRows(tokens, num_valid / 2), H, {0, 0, 0}, 0, false);
  }
  check_gather<T>(batch, SelectedRows(batch, 5), 0, {}, 0, true);
  check_gather<T>(batch, SelectedRows(batch, 0), 7, {}, 0, true);
  if (reduced) return;
  // More blocks than kMaxGridX, for the kernel with a thread for each row.
  const RowBatch many(1, 70, 50, 3102);
  check_gather<T>(many, SelectedRows(many, 65 * 256 + 1), 1, {0, 1, 0}, 0, true);
}

// ---- write_logps, put_label_gradients -------------------------------------------------------

template <typename Scalar>
void check_write_logps(uint64_t seed) {
  RowBatch batch(3, 150, 50, seed);
  const int64_t num_valid = static_cast<int64_t>(batch.valid.size());
  const SelectedRows rows(batch, num_valid + 30);
  describe("%s, %ld rows, seed %lu", DTypeOf<Scalar>::name, rows.R, seed);
  const Buffer<Scalar> max(rows.R), label_z(rows.R), logps(batch.B * batch.T);
  const Buffer<double> sum_exp(rows.R);
  batch.fill(max.data(), rows.R);
  batch.fill(label_z.data(), rows.R);
  for (int64_t i = 0; i < rows.R; ++i) {
    sum_exp[i] = 1.0 + std::fabs(batch.normal());
    if (i % 7 == 3) sum_exp[i] = kNan;
    if (i % 7 == 4) label_z[i] = static_cast<Scalar>(-kInfinity);
    if (i % 7 == 5) label_z[i] = static_cast<Scalar>(kNan);
  }
  const Buffer<double> sum_z(rows.R), sum_exp_z(rows.R);
  const Buffer<double> mean_logit(logps.size()), entropy(logps.size());
  batch.fill(sum_z.data(), rows.R);
  batch.fill(sum_exp_z.data(), rows.R);
  WriteLogpsArgs args{DTypeOf<Scalar>::value, rows.R,         rows.positions.data(), max.data(),
                      sum_exp.data(),         label_z.data(), logps.data()};
  require_equal(cuda::write_logps(args, nullptr), 0, "error of write_logps");
  args.num_labels = 50;
  args.sum_z = sum_z.data();
  args.sum_exp_z = sum_exp_z.data();
  args.mean_logit = mean_logit.data();
  args.entropy = entropy.data();
  require_equal(cuda::write_logps(args, nullptr), 0, "error of write_logps with a report");
  std::vector<int64_t> row_of(static_cast<size_t>(batch.B * batch.T), -1);
  for (int64_t i = 0; i < rows.num_tokens; ++i) {
    row_of[static_cast<size_t>(rows.positions[i])] = i;
  }
  for (int64_t position = 0; position < logps.size(); ++position) {
    const int64_t i = row_of[static_cast<size_t>(position)];
    if (i < 0) {
      require(is_unwritten(logps[position]), "only logps of rows are written");
      require(is_unwritten(mean_logit[position]) && is_unwritten(entropy[position]),
              "only reports of rows are written");
      continue;
    }
    require_close(mean_logit[position], sum_z[i] / 50, 1e-15 * std::fabs(sum_z[i]), "mean_logit");
    const double nats = std::log(sum_exp[i]) - sum_exp_z[i] / sum_exp[i];
    require_close(entropy[position], nats < 0.0 ? 0.0 : nats, 1e-14, "entropy");
    const double expected = (number(label_z[i]) - number(max[i])) - std::log(sum_exp[i]);
    require_close(number(logps[position]), expected, 4 * kUnit<Scalar> * std::fabs(expected),
                  "logp");
  }
}

template <typename T>
void check_put_label_gradients(int64_t first_label, int64_t V, uint64_t seed) {
  RowBatch batch(3, 150, 50, seed);
  const int64_t num_valid = static_cast<int64_t>(batch.valid.size());
  const SelectedRows rows(batch, num_valid + 30);
  describe("%s, labels [%ld, %ld) of %ld, ignore_index %ld, seed %lu", DTypeOf<T>::name,
           first_label, first_label + V, batch.num_labels, batch.ignore_index, seed);
  const Buffer<Compute<T>> gradients(rows.R);
  batch.fill(gradients.data(), rows.R);
  const Rows<T> dlogits(1, rows.R, V, {1, 2, 0});
  require_equal(cuda::put_label_gradients(
                    {DTypeOf<T>::value, rows.R, V, first_label, batch.ignore_index,
                     rows.labels.data(), gradients.data(), dlogits.data(), dlogits.strides().t},
                    nullptr),
                0, "error of put_label_gradients");
  require(dlogits.are_gaps_unwritten(), "only dlogits are written");
  for (int64_t i = 0; i < rows.R; ++i) {
    for (int64_t v = 0; v < V; ++v) {
      const T got = dlogits.row(0, i)[v];
      if (rows.positions[i] >= 0 && rows.labels[i] == first_label + v) {
        require_equal(number(got), number(narrow<T>(gradients[i])), "label's gradient");
      } else {
        require(is_unwritten(got), "only the labels' gradients are written");
      }
    }
  }
}

// ---- add_partial ----------------------------------------------------------------------------

template <typename T>
void check_add_partial(int64_t count, int64_t front, int64_t sum_front, bool is_first) {
  using Scalar = Compute<T>;
  describe("%s, %ld elements from %ld and %ld, the first %d", DTypeOf<T>::name, count, front,
           sum_front, is_first);
  const Buffer<T> partial(count, front);
  const Buffer<Scalar> sum(count, sum_front);
  const auto old = [](int64_t i) { return static_cast<Scalar>(0.1 * static_cast<double>(i % 97)); };
  for (int64_t i = 0; i < count; ++i) {
    partial[i] = narrow<T>(static_cast<Scalar>(i % 31 - 7));
    sum[i] = is_first ? static_cast<Scalar>(kNan) : old(i);
  }
  require_equal(
      cuda::add_partial({DTypeOf<T>::value, count, partial.data(), sum.data(), is_first}, nullptr),
      0, "error of add_partial");
  for (int64_t i = 0; i < count; ++i) {
    const Scalar value = widen(partial[i]);
    require_equal(number(sum[i]), number(is_first ? value : old(i) + value), "sum");
  }
  for (int64_t i = -sum_front; i < 0; ++i) require(is_unwritten(sum[i]), "only sums are written");
}

template <typename T>
void check_add_partials(bool reduced) {
  constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kBlock = 256 * 2 * kWidth;
  for (const int64_t count : {int64_t{0}, int64_t{1}, kWidth - 1, kWidth, kBlock - 1, kBlock,
                              kBlock + kWidth, 2 * kBlock + 1, 5 * kBlock + 3 * kWidth + 1}) {
    for (const bool is_first : {true, false}) {
      check_add_partial<T>(count, 0, 0, is_first);
      check_add_partial<T>(count, 0, 1, is_first);
      if (reduced) continue;
      check_add_partial<T>(count, 1, 0, is_first);
      check_add_partial<T>(count, 1, 1, is_first);
    }
  }
  // More blocks than kMaxGridX, and a block without elements.
  check_add_partial<T>(64 * kBlock + 1, 0, 0, false);
}

// ---- hidden_gradient ------------------------------------------------------------------------

template <typename T>
void check_hidden_gradient(RowBatch& batch, int64_t H, TokenStrides weight_strides,
                           const int64_t (&fronts)[4], bool has_sum) {
  using Scalar = Compute<T>;
  const SelectedRows rows(batch, static_cast<int64_t>(batch.valid.size()) + 2);
  describe("%s, H %ld, %ld rows, weight strides %ld and %ld, from %ld, %ld, %ld and %ld, sum %d",
           DTypeOf<T>::name, H, rows.R, weight_strides.b, weight_strides.t, fronts[0], fronts[1],
           fronts[2], fronts[3], has_sum);
  const HiddenGradients<T> data(batch, rows, H, weight_strides, fronts, has_sum);
  require_equal(cuda::hidden_gradient(data.args(batch, rows), nullptr), 0,
                "error of hidden_gradient");
  std::vector<bool> is_written(static_cast<size_t>(batch.B * batch.T));
  for (int64_t i = 0; i < rows.num_tokens; ++i) {
    const int64_t position = rows.positions[i], label = rows.labels[i];
    is_written[static_cast<size_t>(position)] = true;
    for (int64_t h = 0; h < H; ++h) {
      const double got = number(data.dhidden[position * H + h]);
      if (!batch.is_in_range(label)) {
        require(std::isnan(got), "dhidden of a label out of range", got, kNan);
        continue;
      }
      const double sum = has_sum ? number(data.sum[i * H + h]) : 0.0;
      const double partial = number(data.partial[i * H + h]);
      const double of_label =
          number(data.label_gradients[i]) * number(data.weight[weight_strides.offset(label, h)]);
      const double expected = sum + partial + of_label;
      const double error =
          3 * kUnit<Scalar> * (std::fabs(sum) + std::fabs(partial) + std::fabs(of_label));
      require_close(got, expected, error + 1.01 * half_ulp<T>(expected), "dhidden");
    }
  }
  for (size_t position = 0; position < is_written.size(); ++position) {
    for (int64_t h = 0; h < H && !is_written[position]; ++h) {
      require(is_unwritten(data.dhidden[static_cast<int64_t>(position) * H + h]),
              "only dhidden of rows is written");
    }
  }
  for (int64_t i = -fronts[3]; i < 0; ++i) {
    require(is_unwritten(data.dhidden[i]), "only dhidden is written");
  }
}

template <typename T>
void check_hidden_gradients(bool reduced) {
  constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(T));
  RowBatch batch(3, 47, 11, 3200), small(2, 9, 5, 3202);
  for (const int64_t H : {int64_t{1}, kWidth, kWidth + 1, 5 * kWidth, 300 * kWidth + 1}) {
    RowBatch& tokens = H > 100 * kWidth || (reduced && H != kWidth + 1) ? small : batch;
    const int64_t V = tokens.num_labels, aligned = (H + kWidth - 1) / kWidth * kWidth;
    for (const bool has_sum : {true, false}) {
      check_hidden_gradient<T>(tokens, H, {aligned, 1}, {0, 0, 0, 0}, has_sum);
      check_hidden_gradient<T>(tokens, H, {1, V}, {0, 0, 0, 0}, has_sum);
      // One unaligned pointer at a time.
      check_hidden_gradient<T>(tokens, H, {aligned, 1}, {0, 0, 1, 0}, has_sum);
      if (reduced) continue;
      check_hidden_gradient<T>(tokens, H, {aligned, 1}, {1, 0, 0, 0}, has_sum);
      check_hidden_gradient<T>(tokens, H, {aligned, 1}, {0, 1, 0, 0}, has_sum);
      check_hidden_gradient<T>(tokens, H, {aligned, 1}, {0, 0, 0, 1}, has_sum);
      check_hidden_gradient<T>(tokens, H, {H + 1, 1}, {0, 0, 0, 0}, has_sum);
      check_hidden_gradient<T>(tokens, H, {2 * H, 2}, {1, 1, 1, 1}, has_sum);
    }
  }
}

}  // namespace

void check_token_rows(bool reduced) {
  check_selections(reduced);
  for (uint64_t seed = 3300; seed < 3306; ++seed) {
    check_write_logps<double>(seed);
    check_write_logps<float>(seed);
  }
  for_each_dtype([&](auto, auto element) {
    using T = decltype(element);
    check_gathers<T>(reduced);
    for (uint64_t seed = 3400; seed < 3406; ++seed) {
      check_put_label_gradients<T>(0, 50, seed);
      check_put_label_gradients<T>(0, 17, seed);
      check_put_label_gradients<T>(17, 20, seed);
      check_put_label_gradients<T>(37, 13, seed);
    }
    check_add_partials<T>(reduced);
    check_hidden_gradients<T>(reduced);
  });
}

}  // namespace simpo_ext::kernel_tests
