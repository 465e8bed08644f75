// The kernels of a sharded vocabulary on the CPU. Every buffer has exactly the size that the
// contract states.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/kernels.h"
#include "threads.h"

namespace simpo_ext::test {
namespace {

constexpr int64_t kIgnore = 2;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

size_t index(int64_t i) { return static_cast<size_t>(i); }

double value(double x) { return x; }
double value(float x) { return static_cast<double>(x); }
template <typename Half>
double value(Half x) {
  return static_cast<double>(widen(x));
}

// ---- merge_shards ---------------------------------------------------------------------------

struct Row {
  double max[2], sum[2], z[2];
  double logp;  // expected
};

template <typename Scalar>
void check_merge(bool has_positions) {
  context = std::string("merge: ") + Named<Scalar>::name;
  const double of_two = -1.0 - std::log(1.5 + 2.0 * std::exp(-4.0));
  const std::vector<Row> rows{
      {{5, 1}, {1.5, 2}, {4, kNan}, of_two},  // the label is on the first shard
      {{1, 5}, {2, 1.5}, {kNan, 4}, of_two},  // on the second
      {{5, -kInfinity}, {1.5, 0}, {4, kNan}, -1 - std::log(1.5)},  // an empty shard
      {{5, 1}, {1.5, kNan}, {4, kNan}, kNan},
      {{5, 1}, {1.5, 2}, {kNan, kNan}, kNan},  // the label is on neither
      {{5, 1}, {1.5, 2}, {4, 1}, kNan},        // on both
      {{5, 1}, {1.5, 2}, {4, 1}, 0},           // masked
      {{-kInfinity, -kInfinity}, {0, 0}, {-kInfinity, kNan}, kNan},
      {{5, 1}, {1.5, 2}, {-kInfinity, kNan}, -kInfinity},
  };
  const int64_t N = static_cast<int64_t>(rows.size());
  std::vector<double> shards(index(2 * 3 * N)), sum_exp(index(N));
  std::vector<int64_t> labels(index(N), 7), positions(index(N));
  labels[6] = kIgnore;
  for (int64_t row = 0; row < N; ++row) {
    positions[index(row)] = row == 6 ? -1 : N - 1 - row;
    for (int64_t k = 0; k < 2; ++k) {
      shards[index((3 * k + 0) * N + row)] = rows[index(row)].max[k];
      shards[index((3 * k + 1) * N + row)] = rows[index(row)].sum[k];
      shards[index((3 * k + 2) * N + row)] = rows[index(row)].z[k];
    }
  }
  std::vector<Scalar> logps(index(N), Scalar(77)), max(index(N));
  cpu::merge_shards({Named<Scalar>::dtype,
                     {labels.data(), {N, 1}, 1, N, kIgnore, false},
                     2,
                     shards.data(),
                     has_positions ? positions.data() : nullptr,
                     logps.data(),
                     max.data(),
                     sum_exp.data()});
  for (int64_t row = 0; row < N; ++row) {
    const int64_t position = has_positions ? N - 1 - row : row;
    const double got = value(logps[index(position)]);
    const double want = has_positions && row == 6 ? 77 : rows[index(row)].logp;
    require(std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) < 1e-6,
            "logp", got, want);
    const double largest =
        row == 6 ? 0.0 : std::fmax(rows[index(row)].max[0], rows[index(row)].max[1]);
    require(value(max[index(row)]) == largest, "max", value(max[index(row)]), largest);
  }
  require(sum_exp[6] == 0.0, "sum_exp of a masked row", sum_exp[6]);
}

// ---- add_label_shares, scatter_rows ---------------------------------------------------------

template <typename T>
void check_rows(int64_t H) {
  using Scalar = Compute<T>;
  context = std::string("rows of shards: ") + Named<T>::name + ", H = " + std::to_string(H);
  constexpr int64_t kFirst = 2, V = 3;
  // Labels: on the shard before, ignored, at both ends of this shard, on the next shard, and of a
  // row without a token.
  const std::vector<int64_t> labels{1, kIgnore, 3, 4, 5, kIgnore}, positions{4, 1, 0, 5, 2, -1};
  const int64_t R = static_cast<int64_t>(labels.size());
  std::vector<Scalar> gradients(index(R)), sum(index(R * H));
  std::vector<T> weight(index(V * H)), to(index(6 * H), narrow<T>(Scalar(7)));  // [H, V]
  for (int64_t i = 0; i < R; ++i) gradients[index(i)] = static_cast<Scalar>(i + 1);
  for (int64_t i = 0; i < R * H; ++i) sum[index(i)] = static_cast<Scalar>(i % 5);
  for (int64_t i = 0; i < V * H; ++i) weight[index(i)] = narrow<T>(static_cast<Scalar>(i % 7));
  cpu::add_label_shares({Named<T>::dtype, H, R, kFirst, V, kIgnore, labels.data(), gradients.data(),
                         weight.data(), 1, V, sum.data()},
                        kThreads);
  cpu::scatter_rows({Named<T>::dtype, H, R, positions.data(), sum.data(), to.data()}, kThreads);
  std::vector<double> expected(to.size(), 7.0);
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t h = 0; h < H; ++h) {
      const bool has_label = labels[index(i)] == 3 || labels[index(i)] == 4;
      const double share = static_cast<double>((h * V + labels[index(i)] - kFirst) % 7 * (i + 1));
      const double want = static_cast<double>((i * H + h) % 5) + (has_label ? share : 0.0);
      require(value(sum[index(i * H + h)]) == want, "sum", value(sum[index(i * H + h)]), want);
      if (positions[index(i)] >= 0) expected[index(positions[index(i)] * H + h)] = want;
    }
  }
  for (size_t i = 0; i < to.size(); ++i) {
    require(value(to[i]) == expected[i], "scattered", value(to[i]), expected[i]);
  }
}

}  // namespace

void check_vocab_shards() {
  for (const bool has_positions : {false, true}) {
    check_merge<float>(has_positions);
    check_merge<double>(has_positions);
  }
  for_each_dtype([](auto element) {
    // The last case has enough rows for several threads.
    for (const int64_t H : {1, 3, 64, 40000}) check_rows<decltype(element)>(H);
  });
  context.clear();
}

}  // namespace simpo_ext::test
