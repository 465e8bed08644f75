// Every output has the same bits in any order of threads and blocks, and when the same call runs
// again.

#include <cstdint>
#include <cstring>
#include <vector>

#include "core/kernels.h"
#include "emulator.h"
#include "kernels/buffers.h"
#include "kernels/pair_batch.h"
#include "kernels/parts.h"
#include "kernels/row_batch.h"
#include "kernels/sections.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {
namespace {

using emulation::Order;

using Bytes = std::vector<unsigned char>;

template <typename T>
void append(Bytes& bytes, const Buffer<T>& buffer) {
  bytes.insert(bytes.end(), buffer.bytes(), buffer.bytes() + buffer.num_bytes());
}

// outputs() runs all calls again, in new memory.
template <typename Outputs>
void require_one_result(bool reduced, const Outputs& outputs) {
  emulation::set_schedule(Order::kForward, 0);
  const Bytes expected = outputs();
  const auto check = [&](Order order, uint64_t seed, const char* what) {
    emulation::set_schedule(order, seed);
    const Bytes got = outputs();
    require_equal(static_cast<double>(got.size()), static_cast<double>(expected.size()), what);
    for (size_t i = 0; i < got.size(); ++i) {
      require_equal(static_cast<double>(got[i]), static_cast<double>(expected[i]), what);
    }
  };
  check(Order::kForward, 0, "bits of a second run");
  check(Order::kReverse, 0, "bits in reverse order");
  for (uint64_t seed = 1; seed <= (reduced ? 2 : 5); ++seed) {
    check(Order::kShuffled, seed, "bits in shuffled order");
  }
  emulation::set_schedule(Order::kShuffled, 0);
}

template <typename Logit>
Bytes token_outputs(Shape shape, Layout in, Layout out, LogitTransform transform, uint64_t seed) {
  const TokenBatch<Logit> batch(shape, in, transform, seed % 2 == 0, seed);
  const Rows<Logit> dlogits(shape.B, shape.T, shape.V, out);
  const Buffer<double> mean_logit(shape.B * shape.T), entropy(shape.B * shape.T);
  TokenLogpsArgs args = batch.unshared_forward_args();
  args.mean_logit = mean_logit.data();
  args.entropy = entropy.data();
  args.all_positions = true;
  require_equal(cuda::token_logps(args, nullptr), 0, "error of the report");
  require_equal(cuda::token_logps(batch.forward_args(), nullptr), 0, "error of the forward");
  require_equal(cuda::token_logps_backward(batch.backward_args(dlogits), nullptr), 0,
                "error of the backward");
  require_equal(cuda::token_logps_backward(batch.in_place_args(), nullptr), 0,
                "error of the backward in place");
  Bytes bytes;
  append(bytes, batch.logps);
  append(bytes, batch.max);
  append(bytes, batch.sum_exp);
  append(bytes, mean_logit);
  append(bytes, entropy);
  append(bytes, dlogits.buffer());
  append(bytes, batch.logits.buffer());
  return bytes;
}

template <typename Logit>
void check_token_logps(bool reduced) {
  const struct {
    Shape shape;
    Layout in, out;
    LogitTransform transform;
  } cases[] = {
      // More rows than kMaxGridX; edges without vectors; different alignments.
      {{5, 15, 9}, {3 % (16 / sizeof(Logit)), 0, 0}, {0, 1, 0}, {1.0, 0.0}},
      {{2, 11, 1025}, {1, 0, 0}, {1, 0, 0}, {0.7, 0.0}},
      {{2, 5, 1025}, {0, 3, 0}, {1, 0, 0}, {1.0, 15.0}},
      // The large block.
      {{1, 11, 8193}, {1, 0, 0}, {1, 0, 0}, {1.0, 0.0}},
  };
  uint64_t seed = 2000;
  for (const auto& [shape, in, out, transform] : cases) {
    for (int repeat = 0; repeat < (reduced ? 1 : 2); ++repeat) {
      describe("%s, V %ld, softcap %g, seed %lu", DTypeOf<Logit>::name, shape.V, transform.softcap,
               seed);
      require_one_result(reduced,
                         [&] { return token_outputs<Logit>(shape, in, out, transform, seed); });
      seed += 11;
    }
  }
}

template <typename Scalar>
void check_pairs(bool reduced, int64_t P, SequenceShape shape, bool has_indices,
                 const PairOptions& options, uint64_t seed) {
  describe("%s, P %ld, S %ld, T %ld, flat %d, indices %d", DTypeOf<Scalar>::name, P, shape.S,
           shape.T, shape.is_flat, has_indices);
  require_one_result(reduced, [&] {
    const PairBatch<Scalar> batch(shape, true, seed);
    const PairList list(P, shape.S, has_indices, has_indices, seed);
    const PairOutputs<Scalar> outputs(shape.S, P, options);
    const PairGradients<Scalar> incoming(P, options, 0, seed);
    const Buffer<Scalar> grad = batch.new_gradient(), logps(shape.S);
    const Buffer<int64_t> counts(shape.S), targets(batch.is_flat ? batch.T : 0);
    require_equal(cuda::preference_loss(outputs.args(batch, list, options), nullptr), 0,
                  "error of the forward");
    require_equal(
        cuda::preference_loss_backward(incoming.args(batch, list, options, outputs, grad), nullptr),
        0, "error of the backward");
    require_equal(cuda::sequence_logps(sequence_args(batch, false, logps, counts), nullptr), 0,
                  "error of sequence_logps");
    if (batch.is_flat) {
      Targets labels = batch.targets();
      labels.shift = true;
      require_equal(cuda::sequence_targets({.labels = labels,
                                            .num_labels = 9,
                                            .sequences = batch.sequences(),
                                            .targets = targets.data()},
                                           nullptr),
                    0, "error of sequence_targets");
    }
    Bytes bytes;
    for (const Buffer<Scalar>* buffer :
         {&outputs.loss, &outputs.losses, &outputs.logps, &outputs.rewards, &outputs.sft_loss,
          &outputs.slopes, &grad, &logps}) {
      append(bytes, *buffer);
    }
    append(bytes, outputs.metrics);
    append(bytes, outputs.counts);
    append(bytes, counts);
    append(bytes, targets);
    return bytes;
  });
}

template <typename Logit>
void check_parts(bool reduced) {
  describe("%s, in parts", DTypeOf<Logit>::name);
  require_one_result(reduced, [] {
    const Shape shape{2, 21, 700};
    const int64_t N = shape.B * shape.T;
    const TokenBatch<Logit> batch(shape, {1, 0, 0}, {1.0, 0.0}, true, 2500);
    const Rows<Logit> dlogits(shape.B, shape.T, shape.V, {1, 0, 0});
    const Buffer<Compute<Logit>> max(N), label_z(N), label_gradients(N);
    const Buffer<double> sum_exp(N);
    const Cuts cuts = cuts_of(shape.V, 300);
    for (size_t part = 0; part + 1 < cuts.size(); ++part) {
      require_equal(
          cuda::token_logps(forward_args(batch, cuts, part, max, sum_exp, label_z), nullptr), 0,
          "error of the forward");
    }
    for (const Rows<Logit>* to : {&dlogits, &batch.logits}) {
      for (size_t part = 0; part + 1 < cuts.size(); ++part) {
        require_equal(
            cuda::token_logps_backward(
                backward_args(batch, cuts, part, max, sum_exp, *to, label_gradients), nullptr),
            0, "error of the backward");
      }
    }
    Bytes bytes;
    append(bytes, max);
    append(bytes, sum_exp);
    append(bytes, label_z);
    append(bytes, dlogits.buffer());
    append(bytes, batch.logits.buffer());
    append(bytes, label_gradients);
    return bytes;
  });
}

template <typename T>
void check_token_rows(bool reduced) {
  describe("%s, rows of tokens", DTypeOf<T>::name);
  require_one_result(reduced, [] {
    constexpr int64_t kHidden = 130;
    RowBatch batch(3, 1500, 20, 2600);
    const int64_t R = static_cast<int64_t>(batch.valid.size()) / 8;
    const SelectedRows rows(batch, R);
    const Buffer<Compute<T>> logps(batch.B * batch.T), sum(R * kHidden);
    require_equal(cuda::select_tokens({batch.targets(), batch.num_labels, R, rows.positions.data(),
                                       rows.labels.data(), DTypeOf<T>::value, logps.data()},
                                      nullptr),
                  0, "error of select_tokens");
    const HiddenGradients<T> hidden(batch, rows, kHidden, {kHidden, 1}, {0, 0, 0, 0}, true);
    require_equal(cuda::hidden_gradient(hidden.args(batch, rows), nullptr), 0,
                  "error of hidden_gradient");
    const Buffer<T> source(batch.B * batch.T * kHidden), gathered(R * kHidden), dlogits(R * 20);
    for (int64_t i = 0; i < source.size(); ++i) source[i] = hidden.partial[i % (R * kHidden)];
    require_equal(cuda::gather_rows({DTypeOf<T>::value,
                                     batch.T,
                                     kHidden,
                                     R,
                                     rows.positions.data(),
                                     source.data(),
                                     {batch.T * kHidden, kHidden},
                                     gathered.data()},
                                    nullptr),
                  0, "error of gather_rows");
    for (const bool is_first : {true, false}) {
      require_equal(cuda::add_partial({DTypeOf<T>::value, R * kHidden, hidden.partial.data(),
                                       sum.data(), is_first},
                                      nullptr),
                    0, "error of add_partial");
    }
    require_equal(cuda::put_label_gradients(
                      {DTypeOf<T>::value, R, 20, 0, batch.ignore_index, rows.labels.data(),
                       hidden.label_gradients.data(), dlogits.data(), 20},
                      nullptr),
                  0, "error of put_label_gradients");
    Bytes bytes;
    append(bytes, rows.positions);
    append(bytes, rows.labels);
    append(bytes, logps);
    append(bytes, hidden.dhidden);
    append(bytes, gathered);
    append(bytes, sum);
    append(bytes, dlogits);
    return bytes;
  });
}

}  // namespace

void check_schedules(bool reduced) {
  for_each_dtype([&](auto, auto logit) {
    check_token_logps<decltype(logit)>(reduced);
    check_parts<decltype(logit)>(reduced);
    check_token_rows<decltype(logit)>(reduced);
  });
  const PairOptions mean_of_tokens{
      true,
      {LossType::kSigmoid, 2.0, 0.5, 0.1, 0.0},
      {Reduction::kMean, SftReduction::kToken, EmptyPolicy::kDrop, 0.5}};
  const PairOptions each{false,
                         {LossType::kHinge, 0.5, 0.1, 0.0, 0.0},
                         {Reduction::kNone, SftReduction::kSequence, EmptyPolicy::kNan, 0.5}};
  const int64_t P = reduced ? 5 : 40, few = reduced ? 10 : 130, many = reduced ? 5 : 130;
  check_pairs<float>(reduced, P, {2 * P, 300}, false, mean_of_tokens, 6);
  check_pairs<double>(reduced, few, {2 * few, 40}, false, mean_of_tokens, 7);
  check_pairs<float>(reduced, many, {2 * many, 5}, false, each, 8);
  // Sequences in many pairs, whose gradients all threads add up; more sequences than blocks.
  check_pairs<float>(reduced, 300, {7, reduced ? 5 : 400, true}, true, mean_of_tokens, 9);
  if (!reduced) check_pairs<double>(reduced, 90, {80, 5}, true, each, 10);
}

}  // namespace simpo_ext::kernel_tests
