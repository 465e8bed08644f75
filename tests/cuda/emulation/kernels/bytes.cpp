// The memory contracts of token log-probs and of rows of hidden states.

#include "kernels/bytes.h"

#include <algorithm>
#include <cstdint>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/parts.h"
#include "kernels/row_batch.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

// The number of 16-byte accesses that fit into a row.
template <typename Logit>
uint64_t vectors_in(const Logit* row, int64_t V) {
  const int64_t width = 16 / static_cast<int64_t>(sizeof(Logit));
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Logit));
  return static_cast<uint64_t>(std::max<int64_t>(0, V - (width - past) % width) / width);
}

// Rows are cut into segments of this size, and 16-byte accesses do not cross a cut.
constexpr int64_t kSegmentBytes = 65536;

template <typename Logit>
uint64_t vectors_in_segments(const Logit* row, int64_t V) {
  constexpr int64_t kColumns = kSegmentBytes / static_cast<int64_t>(sizeof(Logit));
  uint64_t vectors = 0;
  for (int64_t v = 0; v < V; v += kColumns) {
    vectors += vectors_in(row + v, std::min(kColumns, V - v));
  }
  return vectors;
}

template <typename Logit>
void check_token_logps(Shape shape, Layout in, Layout out, LogitTransform transform, bool shift,
                       uint64_t seed) {
  describe("%s, T %ld, V %ld, logits from element %ld with gaps of %ld, dlogits from %ld with %ld",
           DTypeOf<Logit>::name, shape.T, shape.V, in.front, in.pad_t, out.front, out.pad_t);
  constexpr uint64_t kLogit = sizeof(Logit), kScalar = sizeof(Compute<Logit>);
  const uint64_t row_bytes = static_cast<uint64_t>(shape.V) * kLogit;
  const TokenBatch<Logit> batch(shape, in, transform, shift, seed);
  const Rows<Logit> dlogits(shape.B, shape.T, shape.V, out);

  // With so few rows, each segment has its own block.
  const uint64_t blocks = std::max<uint64_t>(1, static_cast<uint64_t>(batch.num_segments));
  Counters forward{};
  forward.launches = 1;
  Counters merge{};
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
    if (batch.has_label(t)) forward.bytes_loaded += blocks * kLabel;
    if (batch.is_scored(b, t)) {
      forward.bytes_loaded += row_bytes + kLogit;  // the label's logit again
      forward.vector_loads += vectors_in_segments(x, shape.V);
    }
    forward.bytes_stored += kScalar + kScalar + kDouble;
    if (batch.has_label(t)) merge.bytes_loaded += kLabel;
    if (batch.is_masked(b, t)) return;
    merge.bytes_stored += blocks * 3 * kDouble;
    merge.bytes_loaded += blocks * 3 * kDouble;
  });
  if (batch.num_segments > 0) {
    forward.launches += 1;
    forward.bytes_loaded += merge.bytes_loaded;
    forward.bytes_stored += merge.bytes_stored;
  }
  require_cost("token_logps", forward,
               [&] { return cuda::token_logps(batch.forward_args(), nullptr); });

  const auto cost_of_backward = [&](const Rows<Logit>& to) {
    Counters backward{};
    backward.launches = 1;
    batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
      Logit* dx = to.row(b, t);
      if (batch.has_label(t)) backward.bytes_loaded += blocks * kLabel;
      // The gradient, max and sum_exp, for any label.
      backward.bytes_loaded += blocks * (kScalar + kScalar + kDouble);
      backward.bytes_stored += row_bytes;
      if (!batch.has_gradient(b, t)) {
        backward.vector_stores += vectors_in_segments(dx, shape.V);
        return;
      }
      // The row, and the label's logit and gradient again.
      backward.bytes_loaded += row_bytes + kLogit;
      backward.bytes_stored += kLogit;
      const bool is_aligned_alike =
          reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(dx) % 16;
      const uint64_t vectors = is_aligned_alike ? vectors_in_segments(x, shape.V) : 0;
      backward.vector_loads += vectors;
      backward.vector_stores += vectors;
    });
    return backward;
  };
  require_cost("token_logps_backward", cost_of_backward(dlogits),
               [&] { return cuda::token_logps_backward(batch.backward_args(dlogits), nullptr); });
  require_cost("token_logps_backward in place", cost_of_backward(batch.logits),
               [&] { return cuda::token_logps_backward(batch.in_place_args(), nullptr); });
}

template <typename Logit>
void check_parts_of(Shape shape, int64_t width, uint64_t seed) {
  describe("%s, T %ld, V %ld in parts of %ld", DTypeOf<Logit>::name, shape.T, shape.V, width);
  using Scalar = Compute<Logit>;
  constexpr uint64_t kLogit = sizeof(Logit), kScalar = sizeof(Scalar);
  const TokenBatch<Logit> batch(shape, {}, {1.0, 0.0}, seed % 2 == 0, seed);
  const Rows<Logit> dlogits(shape.B, shape.T, shape.V, {});
  const int64_t N = shape.B * shape.T;
  const Buffer<Scalar> max(N), label_z(N), label_gradients(N);
  const Buffer<double> sum_exp(N);
  const Cuts cuts = cuts_of(shape.V, width);
  const auto has_label = [&](int64_t b, int64_t t, size_t part) {
    const int64_t label = batch.label(b, t);
    return batch.is_scored(b, t) && label >= cuts[part] && label < cuts[part + 1];
  };
  for (size_t part = 0; part + 1 < cuts.size(); ++part) {
    Counters cost{};
    cost.launches = 1;
    const int64_t V = cuts[part + 1] - cuts[part];
    batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
      if (batch.has_label(t)) cost.bytes_loaded += kLabel;
      cost.bytes_stored += kScalar + kDouble;
      if (!batch.is_scored(b, t)) {
        cost.bytes_stored += kScalar;
        return;
      }
      cost.bytes_loaded += static_cast<uint64_t>(V) * kLogit;
      if (has_label(b, t, part)) cost.bytes_loaded += kLogit;
      if (part > 0) cost.bytes_loaded += kScalar + kDouble;
      if (part == 0 || has_label(b, t, part)) cost.bytes_stored += kScalar;
      cost.vector_loads += vectors_in(x + cuts[part], V);
    });
    require_cost("token_logps of a part", cost, [&] {
      return cuda::token_logps(forward_args(batch, cuts, part, max, sum_exp, label_z), nullptr);
    });
  }
  for (size_t part = 0; part + 1 < cuts.size(); ++part) {
    Counters cost{};
    cost.launches = 1;
    const int64_t V = cuts[part + 1] - cuts[part];
    batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
      if (batch.has_label(t)) cost.bytes_loaded += kLabel;
      cost.bytes_loaded += kScalar + kScalar + kDouble;
      cost.bytes_stored += static_cast<uint64_t>(V) * kLogit;
      cost.vector_stores += vectors_in(x + cuts[part], V);
      if (has_label(b, t, part)) cost.bytes_stored += kScalar;
      if (!batch.has_gradient(b, t)) return;
      cost.bytes_loaded += static_cast<uint64_t>(V) * kLogit;
      cost.vector_loads += vectors_in(x + cuts[part], V);
      if (has_label(b, t, part)) {
        cost.bytes_loaded += kLogit;
        cost.bytes_stored += kLogit;
      }
    });
    require_cost("token_logps_backward of a part", cost, [&] {
      return cuda::token_logps_backward(
          backward_args(batch, cuts, part, max, sum_exp, dlogits, label_gradients), nullptr);
    });
  }
}

template <typename Logit>
void check_token_logps_of(bool reduced) {
  const int64_t width = 16 / static_cast<int64_t>(sizeof(Logit));
  uint64_t seed = 1000;
  // No vector; one or none, depending on alignment; single elements at both ends; the small block;
  // the large block.
  for (const int64_t V : {1, 8, 9, 1025, 8193, 20001}) {
    // For the longer ones, float64 has rows of several segments.
    if (reduced && V > (sizeof(Logit) == 8 ? 10000 : 2000)) continue;
    const int64_t to_boundary = (width - V % width) % width;
    const struct {
      Layout in, out;
    } layouts[] = {
        {{0, to_boundary, 0}, {0, to_boundary, 0}},                          // all aligned
        {{1, 0, 0}, {1, 0, 0}},                                              // odd rows
        {{1, to_boundary, 0}, {1, to_boundary + width, 0}},                  // all aligned alike
        {{0, to_boundary, 0}, {1, to_boundary, 0}},                          // none aligned alike
        {{width - 1, to_boundary, 0}, {width - 1, to_boundary + 1, width}},  // some aligned alike
    };
    for (const auto& [in, out] : layouts) {
      const LogitTransform transform =
          seed % 3 == 0 ? LogitTransform{1.0, 15.0} : LogitTransform{1.0, 0.0};
      check_token_logps<Logit>({2, 11, V}, in, out, transform, seed % 2 == 0, seed);
      ++seed;
    }
  }
}

template <typename T>
void check_token_rows(uint64_t seed) {
  using Scalar = Compute<T>;
  constexpr uint64_t kElement = sizeof(T), kScalar = sizeof(Scalar);
  constexpr int64_t kWidth = 16 / static_cast<int64_t>(sizeof(T));
  RowBatch batch(3, 50, 40, seed);
  const SelectedRows rows(batch, static_cast<int64_t>(batch.valid.size()) + 5);
  const uint64_t N = 150, R = static_cast<uint64_t>(rows.R);
  const uint64_t tokens = static_cast<uint64_t>(rows.num_tokens);
  describe("%s, %ld rows, seed %lu", DTypeOf<T>::name, rows.R, seed);

  const Buffer<Scalar> logps(150), values(rows.R);
  const Buffer<double> sum_exp(rows.R);
  Counters cost{.launches = 1,
                .bytes_loaded = static_cast<uint64_t>(batch.num_scored_positions()) * kLabel,
                .bytes_stored = 2 * R * kLabel,
                .vector_loads = 0,
                .vector_stores = 0};
  SelectTokensArgs select{batch.targets(),    batch.num_labels,  rows.R, rows.positions.data(),
                          rows.labels.data(), DTypeOf<T>::value, nullptr};
  require_cost("select_tokens", cost, [&] { return cuda::select_tokens(select, nullptr); });
  select.logps = logps.data();
  cost.bytes_stored += N * kScalar;
  require_cost("select_tokens with logps", cost,
               [&] { return cuda::select_tokens(select, nullptr); });

  batch.fill(values.data(), rows.R);
  require_cost("write_logps",
               {.launches = 1,
                .bytes_loaded = R * kLabel + tokens * (kDouble + 2 * kScalar),
                .bytes_stored = tokens * kScalar,
                .vector_loads = 0,
                .vector_stores = 0},
               [&] {
                 return cuda::write_logps(
                     {DTypeOf<T>::value, rows.R, rows.positions.data(), values.data(),
                      sum_exp.data(), values.data(), logps.data()},
                     nullptr);
               });

  uint64_t in_part = 0, in_range = 0;
  for (int64_t i = 0; i < rows.num_tokens; ++i) {
    in_part += rows.labels[i] >= 10 && rows.labels[i] < 30 ? 1 : 0;
    in_range += batch.is_in_range(rows.labels[i]) ? 1 : 0;
  }
  const Buffer<T> dlogits(rows.R * 20);
  require_cost("put_label_gradients",
               {.launches = 1,
                .bytes_loaded = R * kLabel + in_part * kScalar,
                .bytes_stored = in_part * kElement,
                .vector_loads = 0,
                .vector_stores = 0},
               [&] {
                 return cuda::put_label_gradients(
                     {DTypeOf<T>::value, rows.R, 20, 10, batch.ignore_index, rows.labels.data(),
                      values.data(), dlogits.data(), 20},
                     nullptr);
               });

  for (const int64_t H : {int64_t{1}, kWidth, 3 * kWidth, 150 * kWidth + 1}) {
    describe("%s, H %ld, %ld rows, seed %lu", DTypeOf<T>::name, H, rows.R, seed);
    const Rows<T> source(batch.B, batch.T, H, {0, 1, 0});
    batch.fill(source.data(), source.buffer().size());
    const Buffer<T> gathered(rows.R * H);
    const uint64_t row_bytes = static_cast<uint64_t>(H) * kElement;
    Counters gather{.launches = 1,
                    .bytes_loaded = R * kLabel + tokens * row_bytes,
                    .bytes_stored = R * row_bytes,
                    .vector_loads = 0,
                    .vector_stores = 0};
    for (int64_t i = 0; i < rows.R && H > kWidth; ++i) {
      const T* to = gathered.data() + i * H;
      const int64_t position = rows.positions[i];
      if (position < 0) {
        gather.vector_stores += vectors_in(to, H);
        continue;
      }
      const T* from = source.row(position / batch.T, position % batch.T);
      if (reinterpret_cast<uintptr_t>(from) % 16 != reinterpret_cast<uintptr_t>(to) % 16) continue;
      gather.vector_loads += vectors_in(from, H);
      gather.vector_stores += vectors_in(from, H);
    }
    require_cost("gather_rows", gather, [&] {
      return cuda::gather_rows({DTypeOf<T>::value, batch.T, H, rows.R, rows.positions.data(),
                                source.data(), source.strides(), gathered.data()},
                               nullptr);
    });

    for (const bool has_sum : {true, false}) {
      const HiddenGradients<T> hidden(batch, rows, H, {H, 1}, {0, 0, 0, 0}, has_sum);
      const uint64_t sum_bytes = has_sum ? static_cast<uint64_t>(H) * kScalar : 0;
      const uint64_t vectors = H % kWidth == 0 ? static_cast<uint64_t>(H / kWidth) : 0;
      uint64_t loads = in_range * vectors * (2 + sum_bytes / row_bytes);
      uint64_t stores = tokens * vectors;
      for (int64_t i = 0; i < rows.num_tokens; ++i) {
        const int64_t position = rows.positions[i], label = rows.labels[i];
        const T* dhidden = hidden.dhidden.data() + position * H;
        if (H % kWidth == 0) continue;
        if (!batch.is_in_range(label)) {
          stores += vectors_in(dhidden, H);
        } else if (position % kWidth == 0 && label % kWidth == 0 && i % kWidth == 0) {
          const uint64_t whole =
              static_cast<uint64_t>(H / kWidth);  // the others are single elements
          loads += whole * (has_sum ? 2 + kScalar / kElement : 2);
          stores += whole;
        }
      }
      require_cost("hidden_gradient",
                   {.launches = 1,
                    .bytes_loaded = R * kLabel + tokens * kLabel +
                                    in_range * (kScalar + 2 * row_bytes + sum_bytes),
                    .bytes_stored = tokens * row_bytes,
                    .vector_loads = loads,
                    .vector_stores = stores},
                   [&] { return cuda::hidden_gradient(hidden.args(batch, rows), nullptr); });
    }
  }
}

template <typename T>
void check_add_partial(int64_t count, int64_t front, bool is_first) {
  using Scalar = Compute<T>;
  constexpr uint64_t kElement = sizeof(T), kScalar = sizeof(Scalar);
  describe("%s, %ld elements from %ld, the first %d", DTypeOf<T>::name, count, front, is_first);
  const Buffer<T> partial(count, front);
  const Buffer<Scalar> sum(count);
  const uint64_t elements = static_cast<uint64_t>(count);
  const uint64_t vectors = front == 0 ? elements * kElement / 16 : 0;
  const uint64_t sums = vectors * (kScalar / kElement);
  require_cost("add_partial",
               {.launches = 1,
                .bytes_loaded = elements * (kElement + (is_first ? 0 : kScalar)),
                .bytes_stored = elements * kScalar,
                .vector_loads = vectors + (is_first ? 0 : sums),
                .vector_stores = sums},
               [&] {
                 return cuda::add_partial(
                     {DTypeOf<T>::value, count, partial.data(), sum.data(), is_first}, nullptr);
               });
}

}  // namespace

void check_bytes(bool reduced) {
  for_each_dtype([&](auto, auto logit) { check_token_logps_of<decltype(logit)>(reduced); });
  for_each_dtype([&](auto, auto element) {
    using T = decltype(element);
    check_parts_of<T>({2, 41, 25}, 8, 1100);
    check_parts_of<T>({2, 41, 25}, 1, 1101);
    check_parts_of<T>({2, 21, 1200}, 1000, 1102);
    for (uint64_t row_seed = 1200; row_seed < 1204; ++row_seed) check_token_rows<T>(row_seed);
    for (const int64_t count : {1, 20, 8192, 9001}) {
      for (const bool is_first : {true, false}) {
        check_add_partial<T>(count, 0, is_first);
        check_add_partial<T>(count, 1, is_first);
      }
    }
  });
  check_bytes_of_pairs();
}

}  // namespace simpo_ext::kernel_tests
