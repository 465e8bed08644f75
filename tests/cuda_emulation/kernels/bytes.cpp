// What each call asks of global memory, to the byte: the memory contracts at the head of the
// kernels' files. A byte that all threads of a block load together counts once.

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "core/kernels.h"
#include "emulator.h"
#include "kernels/buffers.h"
#include "kernels/pair_batch.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

using emulation::Counters;

constexpr uint64_t kLabel = sizeof(int64_t), kDouble = sizeof(double), kCount = sizeof(int64_t);

// Runs call() and expects it to cost what is stated.
template <typename Call>
void require_cost(const char* what, const Counters& expected, const Call& call) {
  emulation::read_counters();
  require_equal(call(), 0, what);
  const Counters got = emulation::read_counters();
  const struct {
    const char* name;
    uint64_t Counters::* counter;
  } counters[] = {{"launches", &Counters::launches},
                  {"bytes loaded", &Counters::bytes_loaded},
                  {"bytes stored", &Counters::bytes_stored},
                  {"16-byte loads", &Counters::vector_loads},
                  {"16-byte stores", &Counters::vector_stores}};
  for (const auto& [name, counter] : counters) {
    if (got.*counter == expected.*counter) continue;
    char message[80];
    std::snprintf(message, sizeof(message), "%s, %s", what, name);
    fail(message, static_cast<double>(got.*counter), static_cast<double>(expected.*counter));
  }
}

// 16-byte accesses that a row has room for.
template <typename Logit>
uint64_t vectors_in(const Logit* row, int64_t V) {
  const int64_t width = 16 / static_cast<int64_t>(sizeof(Logit));
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Logit));
  return static_cast<uint64_t>(std::max<int64_t>(0, V - (width - past) % width) / width);
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

  Counters forward{};
  forward.launches = 1;
  batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
    if (batch.has_label(t)) forward.bytes_loaded += kLabel;
    if (batch.is_scored(b, t)) {
      forward.bytes_loaded += row_bytes + kLogit;  // its label's logit again
      forward.vector_loads += vectors_in(x, shape.V);
    }
    forward.bytes_stored += kScalar + kScalar + kDouble;
  });
  require_cost("token_logps", forward,
               [&] { return cuda::token_logps(batch.forward_args(), nullptr); });

  const auto cost_of_backward = [&](const Rows<Logit>& to) {
    Counters backward{};
    backward.launches = 1;
    batch.logits.for_each_row([&](int64_t b, int64_t t, const Logit* x) {
      Logit* dx = to.row(b, t);
      if (batch.has_label(t)) backward.bytes_loaded += kLabel;
      // The gradient, max and sum_exp, asked for together.
      if (batch.is_scored(b, t)) backward.bytes_loaded += kScalar + kScalar + kDouble;
      backward.bytes_stored += row_bytes;
      if (!batch.has_gradient(b, t)) {
        backward.vector_stores += vectors_in(dx, shape.V);
        return;
      }
      // The row, and its label's logit and gradient again.
      backward.bytes_loaded += row_bytes + kLogit;
      backward.bytes_stored += kLogit;
      const bool is_aligned_alike =
          reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(dx) % 16;
      const uint64_t vectors = is_aligned_alike ? vectors_in(x, shape.V) : 0;
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
void check_token_logps_of(bool reduced) {
  const int64_t width = 16 / static_cast<int64_t>(sizeof(Logit));
  uint64_t seed = 1000;
  // No vector, one or none by alignment, ends on both sides, the small block, the large one.
  for (const int64_t V : {1, 8, 9, 1025, 20001}) {
    if (reduced && V > 2000) continue;
    const int64_t to_boundary = (width - V % width) % width;
    const struct {
      Layout in, out;
    } layouts[] = {
        {{0, to_boundary, 0}, {0, to_boundary, 0}},                          // all aligned
        {{1, 0, 0}, {1, 0, 0}},                                              // odd rows
        {{1, to_boundary, 0}, {1, to_boundary + width, 0}},                  // all alike
        {{0, to_boundary, 0}, {1, to_boundary, 0}},                          // none alike
        {{width - 1, to_boundary, 0}, {width - 1, to_boundary + 1, width}},  // some alike
    };
    for (const auto& [in, out] : layouts) {
      const LogitTransform transform =
          seed % 3 == 0 ? LogitTransform{1.0, 15.0} : LogitTransform{1.0, 0.0};
      check_token_logps<Logit>({2, 11, V}, in, out, transform, seed % 2 == 0, seed);
      ++seed;
    }
  }
}

template <typename Scalar>
void check_sequences(int64_t P, int64_t num_positions, uint64_t seed) {
  describe("%s, P %ld, T %ld, seed %lu", DTypeOf<Scalar>::name, P, num_positions, seed);
  constexpr uint64_t kScalar = sizeof(Scalar);
  const PairBatch<Scalar> batch(2 * P, num_positions, seed % 2 == 1, seed / 2);
  const uint64_t B = static_cast<uint64_t>(batch.B), N = B * static_cast<uint64_t>(num_positions);
  const uint64_t labels = static_cast<uint64_t>(batch.num_labels()) * kLabel;
  const uint64_t tokens = static_cast<uint64_t>(batch.num_valid) * kScalar;
  const PairOptions options{true,
                            {LossType::kSigmoid, 2.0, 0.5, 0.0},
                            {Reduction::kMean, SftReduction::kSequence, EmptyPolicy::kDrop, 0.5}};
  const Buffer<Scalar> logps(batch.B), grad(batch.B * num_positions);
  const Buffer<int64_t> counts(batch.B);

  require_cost("sequence_logps",
               {.launches = 1,
                .bytes_loaded = labels + tokens,
                .bytes_stored = B * (kScalar + kCount),
                .vector_loads = 0,
                .vector_stores = 0},
               [&] {
                 return cuda::sequence_logps(
                     {batch.kDType, batch.token_logps(), batch.token_strides, batch.targets(), true,
                      logps.data(), counts.data()},
                     nullptr);
               });
  require_cost("sequence_logps_backward",
               {.launches = 1,
                .bytes_loaded = labels + B * (kScalar + kCount),
                .bytes_stored = N * kScalar,
                .vector_loads = 0,
                .vector_stores = 0},
               [&] {
                 return cuda::sequence_logps_backward({batch.kDType, batch.targets(), true,
                                                       logps.data(), 1, counts.data(), grad.data()},
                                                      nullptr);
               });

  // The sums and counts of sequences go through memory, from one launch to the other. The O(P)
  // outputs behind them are written by code that the CPU shares, and which does not count.
  const uint64_t sums_and_counts = B * (kDouble + kCount);
  const PairOutputs<Scalar> outputs(P, options);
  require_cost("preference_loss",
               {.launches = 2,
                .bytes_loaded = labels + tokens + sums_and_counts,
                .bytes_stored = sums_and_counts,
                .vector_loads = 0,
                .vector_stores = 0},
               [&] { return cuda::preference_loss(outputs.args(batch, options), nullptr); });

  // Each block counts the pairs anew; how many blocks there are is no part of the contract.
  const PairGradients<Scalar> incoming(P, options, 0, seed);
  emulation::read_counters();
  require_equal(
      cuda::preference_loss_backward(incoming.args(batch, options, outputs, grad.data()), nullptr),
      0, "error of preference_loss_backward");
  const Counters got = emulation::read_counters();
  const uint64_t bytes_of_block = B * kCount;
  const uint64_t blocks = (got.bytes_loaded - labels) / bytes_of_block;
  require_equal(static_cast<double>(got.launches), 1, "preference_loss_backward, launches");
  require_equal(static_cast<double>(got.bytes_loaded),
                static_cast<double>(labels + blocks * bytes_of_block),
                "preference_loss_backward, bytes loaded: whole blocks");
  require(blocks >= 1 && blocks <= 1024, "preference_loss_backward, blocks",
          static_cast<double>(blocks), 1024);
  require_equal(static_cast<double>(got.bytes_stored), static_cast<double>(N * kScalar),
                "preference_loss_backward, bytes stored");
}

}  // namespace

void check_bytes(bool reduced) {
  for_each_dtype([&](auto, auto logit) { check_token_logps_of<decltype(logit)>(reduced); });
  uint64_t seed = 0;
  for (const int64_t P : {1, 3, 40}) {
    for (const int64_t num_positions : {1, 5, 300}) {
      for (int repeat = 0; repeat < 2; ++repeat) {
        check_sequences<double>(P, num_positions, seed);
        check_sequences<float>(P, num_positions, seed);
        ++seed;
      }
    }
  }
}

}  // namespace simpo_ext::kernel_tests
