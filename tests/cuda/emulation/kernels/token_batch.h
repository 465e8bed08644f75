// A batch for token_logps with every kind of row that the contracts distinguish.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/reference.h"
#include "kernels/sections.h"

namespace simpo_ext::kernel_tests {

template <typename Logit>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
  static constexpr const char* name = "float64";
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
  static constexpr const char* name = "float32";
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBFloat16;
  static constexpr const char* name = "bfloat16";
};
template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::kFloat16;
  static constexpr const char* name = "float16";
};

template <typename Function>
void for_each_dtype(const Function& function) {
  function(DTypeOf<double>{}, double{});
  function(DTypeOf<float>{}, float{});
  function(DTypeOf<BFloat16>{}, BFloat16{});
  function(DTypeOf<Float16>{}, Float16{});
}

constexpr int64_t kIgnore = -100;

enum class RowKind : int {
  kFlat,
  kPeakedAtLabel,
  kPeakedElsewhere,
  kMasked,
  kZeroGradient,
  kNegativeLabel,
  kLabelIsV,
  kHugeLabel,
  kSomeMinusInfinity,
  kLabelMinusInfinity,
  kAllMinusInfinity,
  kOnePlusInfinity,
  kOneNan,
  kLowestFill,
  kLabelLowest,
  kAllLowest,
  kCommonOffset,
  kConstant,
  kWide,  // probabilities down to where exp() is 0
  kNanGradient,
  kNumKinds
};
constexpr int64_t kNumKinds = static_cast<int64_t>(RowKind::kNumKinds);

struct Shape {
  int64_t B, T, V;
};

template <typename Logit>
Logit lowest() {
  if constexpr (std::is_same_v<Logit, BFloat16>)
    return {0xff7f};
  else if constexpr (std::is_same_v<Logit, Float16>)
    return {0xfbff};
  else
    return std::numeric_limits<Logit>::lowest();
}

template <typename Logit>
class TokenBatch {
 public:
  using Scalar = Compute<Logit>;

  TokenBatch(Shape shape, Layout layout, LogitTransform transform, bool shift, uint64_t seed)
      : shape(shape),
        transform(transform),
        logits(shape.B, shape.T, shape.V, layout),
        logps(shape.B * shape.T),
        max(shape.B * shape.T),
        sum_exp(shape.B * shape.T),
        num_segments(cuda::shared_segments(DTypeOf<Logit>::value, shape.B * shape.T, shape.V)),
        seed_(seed),
        shift_(shift),
        random_(seed),
        // A slice of a wider tensor, or every other column of one.
        label_strides_{2 * shape.T + 1, 2 - static_cast<int64_t>(seed % 2)},
        labels_(extent(label_strides_)),
        // Row by row, or transposed.
        grad_strides_{seed % 3 == 0 ? TokenStrides{1, shape.B} : TokenStrides{shape.T + 1, 1}},
        grad_(extent(grad_strides_)),
        segments_(3 * num_segments * shape.B * shape.T) {
    // The memory between them has invalid labels, and NaN as gradients.
    for (int64_t i = 0; i < labels_.size(); ++i) labels_[i] = shape.V + 7;
    for (int64_t i = 0; i < grad_.size(); ++i) grad_[i] = static_cast<Scalar>(kNan);
    logits.for_each_gap([](unsigned char* bytes, size_t count) {
      for (size_t i = 0; i + sizeof(Logit) <= count; i += sizeof(Logit)) {
        const Logit nan = narrow<Logit>(static_cast<Scalar>(kNan));
        std::memcpy(bytes + i, &nan, sizeof(nan));
      }
    });
    logits.for_each_row([&](int64_t b, int64_t t, Logit* x) { fill_row(b, t, x); });
  }

  Targets targets() const {
    return {labels_.data(), label_strides_, shape.B, shape.T, kIgnore, shift_};
  }

  // Each row has one block.
  TokenLogpsArgs unshared_forward_args() const {
    return {DTypeOf<Logit>::value, shape.V,    logits.data(),
            logits.strides(),      targets(),  transform,
            logps.data(),          max.data(), sum_exp.data()};
  }

  TokenLogpsArgs forward_args() const {
    TokenLogpsArgs args = unshared_forward_args();
    if (num_segments > 0) args.segments = segments_.data();
    return args;
  }

  TokenLogpsBackwardArgs backward_args(const Rows<Logit>& dlogits) const {
    return {DTypeOf<Logit>::value, shape.V,        logits.data(),
            logits.strides(),      targets(),      transform,
            grad_.data(),          grad_strides_,  max.data(),
            sum_exp.data(),        dlogits.data(), dlogits.strides()};
  }

  TokenLogpsBackwardArgs in_place_args() const { return backward_args(logits); }

  int64_t label(int64_t b, int64_t t) const { return targets().at(b, t); }
  Scalar grad(int64_t b, int64_t t) const { return grad_[grad_strides_.offset(b, t)]; }
  bool has_label(int64_t t) const { return targets().has_label(t); }
  bool is_masked(int64_t b, int64_t t) const { return label(b, t) == kIgnore; }
  bool is_scored(int64_t b, int64_t t) const { return label(b, t) >= 0 && label(b, t) < shape.V; }
  bool has_gradient(int64_t b, int64_t t) const {
    return is_scored(b, t) && grad(b, t) != Scalar(0);
  }

  const Shape shape;
  const LogitTransform transform;
  const Rows<Logit> logits;
  const Buffer<Scalar> logps, max;
  const Buffer<double> sum_exp;
  const int64_t num_segments;  // segments of a row that blocks share, or 0

 private:
  int64_t extent(TokenStrides strides) const {
    if (shape.B * shape.T == 0) return 0;
    return strides.offset(shape.B - 1, shape.T - 1) + 1;
  }

  static Logit from(double value) { return narrow<Logit>(static_cast<Scalar>(value)); }
  double normal(double deviation) {
    return std::normal_distribution<double>(0.0, deviation)(random_);
  }
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(bound));
  }

  // Before the first vector, at both ends, after the last vector, and anywhere.
  int64_t some_element(int64_t turn) {
    const int64_t V = shape.V;
    const int64_t elements[] = {
        0, V - 1, below(V), std::min<int64_t>(2, V - 1), std::max<int64_t>(0, V - 3), below(V)};
    return elements[turn % 6];
  }

  void fill_row(int64_t b, int64_t t, Logit* x) {
    const int64_t row = b * shape.T + t, V = shape.V;
    const int64_t turn = row + static_cast<int64_t>(seed_ % 1000);
    const RowKind kind = static_cast<RowKind>(turn % kNumKinds);
    const int64_t label = V == 0 ? 0 : some_element(turn + turn / kNumKinds);
    const auto fill = [&](const auto& value) {
      for (int64_t v = 0; v < V; ++v) x[v] = from(value(v));
    };
    const auto put = [&](int64_t v, double value) {
      if (V > 0) x[v] = from(value);
    };
    // Not the label's column, if there is another.
    const auto another = [&] {
      const int64_t v = V == 0 ? 0 : some_element(turn / kNumKinds);
      return v == label && V > 1 ? (v + 1) % V : v;
    };

    fill([&](int64_t) { return normal(3.0); });
    switch (kind) {
      case RowKind::kPeakedAtLabel:
      case RowKind::kPeakedElsewhere:
        fill([&](int64_t) { return normal(1.0) - 6.0; });
        for (int i = 0; i < 3; ++i) put(V == 0 ? 0 : below(V), 6.0 + normal(1.0));
        put(kind == RowKind::kPeakedAtLabel ? label : another(), 14.0);
        break;
      case RowKind::kSomeMinusInfinity:
        fill([&](int64_t v) { return v % 3 == 1 && v != label ? -kInfinity : normal(3.0); });
        break;
      case RowKind::kLabelMinusInfinity:
        put(label, -kInfinity);
        break;
      case RowKind::kAllMinusInfinity:
        fill([](int64_t) { return -kInfinity; });
        break;
      case RowKind::kOnePlusInfinity:
        put(another(), kInfinity);
        break;
      case RowKind::kOneNan:
        put(another(), kNan);
        break;
      case RowKind::kLowestFill:
        for (int64_t v = 0; v < V; ++v) {
          if (v % 7 != 2 && v != label) x[v] = lowest<Logit>();
        }
        break;
      case RowKind::kLabelLowest:
        if (V > 1) x[label] = lowest<Logit>();
        break;
      case RowKind::kAllLowest:
        // With a scale above 1, they would be infinite.
        for (int64_t v = 0; v < V && transform.logit_scale <= 1.0; ++v) x[v] = lowest<Logit>();
        break;
      case RowKind::kCommonOffset:
        fill([&](int64_t) { return 1e4 - std::fabs(normal(3.0)); });
        put(another(), 1e4);
        break;
      case RowKind::kConstant:
        fill([](int64_t) { return -2.5; });
        break;
      case RowKind::kWide:
        fill([&](int64_t v) { return v % 2 == 0 ? normal(3.0) : -150.0 * below(1000) / 1000; });
        break;
      default:
        break;
    }

    double grad = normal(2.0);
    if (kind == RowKind::kZeroGradient) grad = turn % 2 == 0 ? 0.0 : -0.0;
    if (kind == RowKind::kMasked || kind == RowKind::kNanGradient || !targets().has_label(t)) {
      grad = kNan;
    }
    grad_[grad_strides_.offset(b, t)] = static_cast<Scalar>(grad);
    if (!targets().has_label(t)) return;
    labels_[targets().label_offset(b, t)] =
        kind == RowKind::kMasked          ? kIgnore
        : kind == RowKind::kNegativeLabel ? -1
        : kind == RowKind::kLabelIsV      ? V
        : kind == RowKind::kHugeLabel     ? (turn % 2 == 0 ? std::numeric_limits<int64_t>::max()
                                                           : std::numeric_limits<int64_t>::min())
                                          : label;
  }

  uint64_t seed_;
  bool shift_;
  std::mt19937_64 random_;
  TokenStrides label_strides_;
  Buffer<int64_t> labels_;
  TokenStrides grad_strides_;
  Buffer<Scalar> grad_;
  Buffer<double> segments_;
};

}  // namespace simpo_ext::kernel_tests
