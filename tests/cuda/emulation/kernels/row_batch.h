// The tokens of a batch, whose valid ones become rows: the result that select_tokens must give.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {

// One token, as the kernels see it.
struct SelectedToken {
  int64_t position;
  int64_t label;
};

// Labels of a vocabulary of num_labels, some out of range.
class RowBatch {
 public:
  RowBatch(int64_t B, int64_t num_positions, int64_t num_labels, uint64_t seed)
      : B(B),
        T(num_positions),
        num_labels(num_labels),
        // Outside the vocabulary, as usual, or inside.
        ignore_index(seed % 3 == 0 ? num_labels / 2 : kIgnore),
        shift_(seed % 2 == 1),
        random_(seed),
        label_strides_(seed % 4 < 2 ? TokenStrides{T, 1} : TokenStrides{1, B}),
        labels_(B * T) {
    const int64_t out_of_range[] = {-1, num_labels, std::numeric_limits<int64_t>::min(),
                                    std::numeric_limits<int64_t>::max()};
    for (int64_t i = 0; i < labels_.size(); ++i) {
      const uint64_t kind = random_() % 100;
      labels_[i] = kind < 45 ? ignore_index
                   : kind < 50
                       ? out_of_range[kind % 4]
                       : static_cast<int64_t>(random_() % static_cast<uint64_t>(num_labels));
    }
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < T; ++t) {
        if (targets().is_valid(b, t)) valid.push_back({b * T + t, targets().at(b, t)});
      }
    }
  }

  Targets targets() const { return {labels_.data(), label_strides_, B, T, ignore_index, shift_}; }
  // The number of labels that may be read.
  int64_t num_scored_positions() const { return B * (shift_ && T > 0 ? T - 1 : T); }
  bool is_in_range(int64_t label) const { return label >= 0 && label < num_labels; }
  double normal() { return std::normal_distribution<double>(0.0, 2.0)(random_); }

  template <typename T>
  void fill(T* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = narrow<T>(static_cast<Compute<T>>(normal()));
  }

  const int64_t B, T, num_labels, ignore_index;
  std::vector<SelectedToken> valid;

 private:
  bool shift_;
  std::mt19937_64 random_;
  TokenStrides label_strides_;
  Buffer<int64_t> labels_;
};

// The R rows of a batch.
struct SelectedRows {
  SelectedRows(const RowBatch& batch, int64_t R)
      : R(R),
        num_tokens(std::min(R, static_cast<int64_t>(batch.valid.size()))),
        positions(R),
        labels(R) {
    for (int64_t i = 0; i < R; ++i) {
      const bool has_token = i < num_tokens;
      positions[i] = has_token ? batch.valid[static_cast<size_t>(i)].position : -1;
      labels[i] = has_token ? batch.valid[static_cast<size_t>(i)].label : batch.ignore_index;
    }
  }

  const int64_t R;
  const int64_t num_tokens;  // the first rows, which have a token
  const Buffer<int64_t> positions, labels;
};

// The arguments of hidden_gradient, and dhidden.
template <typename T>
struct HiddenGradients {
  using Scalar = Compute<T>;

  // fronts: those of the weight, the partial products, their sum and dhidden.
  HiddenGradients(RowBatch& batch, const SelectedRows& rows, int64_t H, TokenStrides weight_strides,
                  const int64_t (&fronts)[4], bool has_sum)
      : H(H),
        weight_strides(weight_strides),
        label_gradients(rows.R),
        weight(weight_strides.offset(batch.num_labels - 1, H - 1) + 1, fronts[0]),
        partial(rows.R * H, fronts[1]),
        sum(has_sum ? rows.R * H : 0, fronts[2]),
        dhidden(batch.B * batch.T * H, fronts[3]) {
    batch.fill(label_gradients.data(), label_gradients.size());
    batch.fill(weight.data(), weight.size());
    batch.fill(partial.data(), partial.size());
    batch.fill(sum.data(), sum.size());
  }

  HiddenGradientArgs args(const RowBatch& batch, const SelectedRows& rows) const {
    return {DTypeOf<T>::value,
            batch.T,
            H,
            rows.R,
            batch.num_labels,
            rows.positions.data(),
            rows.labels.data(),
            label_gradients.data(),
            weight.data(),
            weight_strides.b,
            weight_strides.t,
            partial.data(),
            sum.size() > 0 ? sum.data() : nullptr,
            dhidden.data()};
  }

  const int64_t H;
  const TokenStrides weight_strides;  // of labels, and of H
  const Buffer<Scalar> label_gradients;
  const Buffer<T> weight, partial;
  const Buffer<Scalar> sum;
  const Buffer<T> dhidden;
};

}  // namespace simpo_ext::kernel_tests
