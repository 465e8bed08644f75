// The memory contracts of sequences, of the flat layout and of pairs.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/bytes.h"
#include "kernels/pair_batch.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {
namespace {

// Each form of sequences and pairs.
struct PairForm {
  bool is_flat, has_indices, has_weights;
};

template <typename Scalar>
void check_pairs(int64_t P, int64_t num_positions, PairForm form, uint64_t seed) {
  const int64_t S = form.has_indices ? P + 2 : 2 * P;
  describe("%s, P %ld, S %ld, T %ld, flat %d, indices %d, weights %d, seed %lu",
           DTypeOf<Scalar>::name, P, S, num_positions, form.is_flat, form.has_indices,
           form.has_weights, seed);
  constexpr uint64_t kScalar = sizeof(Scalar);
  const PairBatch<Scalar> batch({S, num_positions, form.is_flat}, seed % 2 == 1, seed / 2);
  const PairList list(P, S, form.has_indices, form.has_weights, seed);
  const uint64_t sequences = static_cast<uint64_t>(S), pairs = static_cast<uint64_t>(P);
  const uint64_t labels = static_cast<uint64_t>(batch.num_labels()) * kLabel;
  const uint64_t tokens = static_cast<uint64_t>(batch.num_valid) * kScalar;
  // The ends of a sequence, and the indices and weight of a pair.
  const uint64_t range = form.is_flat ? 2 * kLabel : 0;
  const uint64_t weight = form.has_weights ? kDouble : 0;
  const uint64_t members = (form.has_indices ? 2 * kLabel : 0) + weight;
  uint64_t positions = static_cast<uint64_t>(batch.B * batch.T);
  if (form.is_flat) positions = static_cast<uint64_t>(batch.num_labels());  // without padding
  const PairOptions options{true,
                            {LossType::kSigmoid, 2.0, 0.5, 0.0, 0.0},
                            {Reduction::kMean, SftReduction::kSequence, EmptyPolicy::kDrop, 0.5}};
  const Buffer<Scalar> logps(S), grad = batch.new_gradient();
  const Buffer<int64_t> counts(S);

  require_cost(
      "sequence_logps",
      {.launches = 1,
       .bytes_loaded = labels + tokens + sequences * range,
       .bytes_stored = sequences * (kScalar + kCount),
       .vector_loads = 0,
       .vector_stores = 0},
      [&] { return cuda::sequence_logps(sequence_args(batch, true, logps, counts), nullptr); });
  require_cost("sequence_logps_backward",
               {.launches = 1,
                .bytes_loaded = labels + sequences * (range + kScalar + kCount),
                .bytes_stored = positions * kScalar,
                .vector_loads = 0,
                .vector_stores = 0},
               [&] {
                 return cuda::sequence_logps_backward(
                     sequence_backward_args(batch, true, logps, 1, counts, grad), nullptr);
               });

  // The first launch writes the sums and counts of sequences, and the second reads them. Code that
  // the CPU kernels share writes the O(P) outputs, and these accesses are not counted.
  const PairOutputs<Scalar> outputs(S, P, options);
  require_cost("preference_loss",
               {.launches = 2,
                .bytes_loaded = labels + tokens + sequences * range +
                                pairs * (members + 2 * (kDouble + kCount)),
                .bytes_stored = sequences * (kDouble + kCount),
                .vector_loads = 0,
                .vector_stores = 0},
               [&] { return cuda::preference_loss(outputs.args(batch, list, options), nullptr); });

  // For a sequence, the counts and weight of its pair. With indices, all indices to find its pairs,
  // and the counts of those.
  uint64_t gradients = sequences * (2 * kCount + weight);
  if (form.has_indices) {
    gradients = sequences * pairs * members;
    for (int64_t p = 0; p < P; ++p) {
      gradients += (list.chosen(p) == list.rejected(p) ? 1 : 2) * 2 * kCount;
    }
  }
  // Each block counts the pairs. The number of blocks is not part of the contract. Here a sequence
  // has one block, since it has few positions.
  const PairGradients<Scalar> incoming(P, options, 0, seed);
  emulation::read_counters();
  require_equal(
      cuda::preference_loss_backward(incoming.args(batch, list, options, outputs, grad), nullptr),
      0, "error of preference_loss_backward");
  const Counters got = emulation::read_counters();
  const uint64_t once = labels + sequences * range + gradients;
  const uint64_t bytes_of_block = pairs * (members + 2 * kCount);
  const uint64_t blocks = (got.bytes_loaded - once) / bytes_of_block;
  require_equal(static_cast<double>(got.launches), 1, "preference_loss_backward, launches");
  require_equal(static_cast<double>(got.bytes_loaded),
                static_cast<double>(once + blocks * bytes_of_block),
                "preference_loss_backward, bytes loaded: whole blocks");
  require(blocks >= 1 && blocks <= std::min<uint64_t>(sequences, 1024),
          "preference_loss_backward, blocks", static_cast<double>(blocks), 1024);
  require_equal(static_cast<double>(got.bytes_stored), static_cast<double>(positions * kScalar),
                "preference_loss_backward, bytes stored");
}

void check_sequence_targets(const std::vector<int64_t>& lengths, int64_t padding, bool shift) {
  std::vector<int64_t> cuts{padding};
  uint64_t scored = 0;
  for (const int64_t length : lengths) {
    cuts.push_back(cuts.back() + length);
    scored += static_cast<uint64_t>(shift ? std::max<int64_t>(length - 1, 0) : length);
  }
  const int64_t N = cuts.back() + padding, S = static_cast<int64_t>(lengths.size());
  describe("sequence_targets, S %ld, N %ld, shift %d", S, N, shift);
  const Buffer<int64_t> labels(N), targets(N);
  // Each sequence has a block for every 1024 positions of the row, at most 64, and each block reads
  // the sequence's ends.
  const uint64_t blocks = static_cast<uint64_t>(S * std::min<int64_t>((N + 1023) / 1024, 64));
  require_cost("sequence_targets",
               {.launches = static_cast<uint64_t>(N == 0   ? 0
                                                  : S == 0 ? 1
                                                           : 2),
                .bytes_loaded = scored * kLabel + blocks * 2 * kLabel,
                .bytes_stored = (static_cast<uint64_t>(N) + scored) * kLabel,
                .vector_loads = 0,
                .vector_stores = 0},
               [&] {
                 return cuda::sequence_targets(
                     {.labels = {labels.data(), {N, 1}, 1, N, kIgnore, shift},
                      .num_labels = 9,
                      .sequences = {cuts.data(), S},
                      .targets = targets.data()},
                     nullptr);
               });
}

}  // namespace

void check_bytes_of_pairs() {
  uint64_t seed = 0;
  for (const int64_t P : {1, 3, 40}) {
    for (const int64_t num_positions : {1, 5, 300}) {
      // First pairs in the order of the sequences, then each form in turn.
      for (const uint64_t i : {uint64_t{0}, seed}) {
        // The padded and the flat layout equally often, in each combination with other forms.
        const PairForm form{i % 4 >= 2, i % 3 != 0, i % 8 >= 4};
        check_pairs<double>(P, num_positions, form, seed);
        check_pairs<float>(P, num_positions, {form.is_flat, form.has_indices, !form.has_weights},
                           seed);
        ++seed;
      }
    }
  }
  for (const bool shift : {false, true}) {
    check_sequence_targets({}, 0, shift);
    check_sequence_targets({}, 7, shift);
    check_sequence_targets({5, 0, 1, 300}, 3, shift);
    check_sequence_targets({1025, 0, 900, 70}, 200, shift);
  }
}

}  // namespace simpo_ext::kernel_tests
