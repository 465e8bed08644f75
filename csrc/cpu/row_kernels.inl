// The passes over a row, on the vectors of one instruction set. Each translation unit of
// row_kernels_*.cpp defines SIMPO_ISA, includes one simd_*.h and then this.
//
// Memory contract: a forward pass reads each logit once and keeps nothing but sums in registers; a
// backward pass reads each once and writes its gradient. What becomes of an element depends on
// neither alignment nor its place in a vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/compensated_sum.h"
#include "core/dispatch.h"
#include "core/logsumexp.h"
#include "cpu/row_kernels.h"
#include "cpu/vector_math.h"

namespace simpo_ext::cpu {
inline namespace SIMPO_ISA {
namespace {

// Logits between two looks at whether the reference that is subtracted from them is still good. A
// block stays in the second-level cache, should it have to be summed again.
constexpr int64_t kBlock = 8192;
// Logits whose maximum is the first reference.
constexpr int64_t kFirstLook = 256;
// How far a logit may lie above the reference: exp of the difference is then as accurate as below.
constexpr double kSlack = 8.0;
// Terms a lane adds up in its own precision before double takes over. Where one term outweighs all
// others, those that share its lane lose their last digits, but only these.
constexpr int64_t kTermsPerLane = 32;
constexpr int64_t kPrefetchBytes = 8192;

template <typename T>
constexpr int64_t kStep = 2 * kPairsPerStep * Vec<Compute<T>>::kSize;

template <typename T>
void prefetch_step(const T* x) {
  for (int64_t byte = 0; byte < kStep<T> * int64_t{sizeof(T)}; byte += 64) {
    prefetch(reinterpret_cast<const char*>(x) + kPrefetchBytes + byte);
  }
}

// Sums of lanes. Those of float are emptied into double, and those of double are compensated.
template <typename Scalar>
class LaneSums;

template <>
class LaneSums<float> {
 public:
  void add(Vec<float> x) { sum_ = sum_ + x; }
  // Once every kTermsPerLane terms.
  void empty() {
    add_widened(sum_, low_, high_);
    sum_ = Vec<float>(0.0f);
  }
  // Of emptied sums.
  template <int kVectors>
  static double total(const LaneSums (&sums)[kVectors]) {
    Vec<double> total = sums[0].low_ + sums[0].high_;
    for (int k = 1; k < kVectors; ++k) total = total + (sums[k].low_ + sums[k].high_);
    return sum_of_lanes(total);
  }

 private:
  Vec<float> sum_{0.0f};
  Vec<double> low_{0.0}, high_{0.0};
};

template <>
class LaneSums<double> {
 public:
  void add(Vec<double> x) {
    const Vec<double> sum = sum_ + x, added = sum - sum_;
    lost_ = lost_ + ((sum_ - (sum - added)) + (x - added));
    sum_ = sum;
  }
  void empty() {}
  template <int kVectors>
  static double total(const LaneSums (&sums)[kVectors]) {
    CompensatedSum<double> total;
    for (const LaneSums& lanes : sums) {
      for (const Vec<double>& vector : {lanes.sum_, lanes.lost_}) {
        double values[Vec<double>::kSize];
        __builtin_memcpy(values, &vector, sizeof(values));
        for (const double value : values) total.add(value);
      }
    }
    return total.value();
  }

 private:
  Vec<double> sum_{0.0}, lost_{0.0};
};

template <typename Scalar>
struct BlockSum {
  double sum;      // of exp(z - reference)
  Scalar largest;  // z; NaN is left out
};

template <typename T, class Logits>
BlockSum<Compute<T>> sum_block(const T* x, int64_t n, const Logits& logits, Compute<T> reference) {
  using V = Vec<Compute<T>>;
  constexpr int kVectors = 2 * kPairsPerStep;
  const ScaledExp<Compute<T>> exp(Compute<T>(1));
  const V shift(reference);
  LaneSums<Compute<T>> sums[kVectors];
  V largest[kVectors];
  for (V& lanes : largest) lanes = V(-std::numeric_limits<Compute<T>>::infinity());

  int64_t i = 0;
  while (i + kStep<T> <= n) {
    const int64_t end = std::min(i + kTermsPerLane * kStep<T>, n - n % kStep<T>);
    for (; i < end; i += kStep<T>) {
      prefetch_step(x + i);
      V z[kVectors];
      for (int k = 0; k < kVectors; k += 2) {
        load_pair_in_any_order(x + i + k * V::kSize, z[k], z[k + 1]);
      }
      SIMPO_EACH z[k] = logits.z(z[k]);
      SIMPO_EACH largest[k] = larger(z[k], largest[k]);
      SIMPO_EACH z[k] = z[k] - shift;
      exp.apply(z);
      SIMPO_EACH sums[k].add(z[k]);
    }
    SIMPO_EACH sums[k].empty();
  }
  for (; i < n; i += V::kSize) {
    const int64_t count = std::min(V::kSize, n - i);
    T padded[V::kSize];
    for (int64_t lane = 0; lane < V::kSize; ++lane) padded[lane] = x[lane < count ? i + lane : i];
    V z[1] = {logits.z(load(padded))};
    largest[0] = larger(z[0], largest[0]);
    z[0] = z[0] - shift;
    exp.apply(z);
    sums[0].add(first_lanes(z[0], count));
  }
  sums[0].empty();
  V all = largest[0];
  for (int k = 1; k < kVectors; ++k) all = larger(all, largest[k]);
  return {LaneSums<Compute<T>>::total(sums), largest_lane(all)};
}

// Leaves NaN out.
template <typename T>
Compute<T> largest_of(const T* x, int64_t n) {
  using V = Vec<Compute<T>>;
  Compute<T> largest = -std::numeric_limits<Compute<T>>::infinity();
  int64_t i = 0;
  if (n >= V::kSize) {
    V lanes(largest);
    for (; i + V::kSize <= n; i += V::kSize) lanes = larger(load(x + i), lanes);
    largest = largest_lane(lanes);
  }
  for (; i < n; ++i) {
    const Compute<T> value = widen(x[i]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

// One logit, through a vector, so that rounding is that of the passes.
template <class Logits>
typename Logits::ScalarType first_z(const Logits& logits, typename Logits::ScalarType x) {
  using V = Vec<typename Logits::ScalarType>;
  return largest_lane(logits.z(V(x)));
}

template <typename T, class Logits>
RunSum sum_exp(const T* x, int64_t n, const Logits& logits, Compute<T> hint) {
  using Scalar = Compute<T>;
  using Limits = std::numeric_limits<Scalar>;
  // Not -inf, from which nothing could be subtracted. Whatever is finite and far above it, which is
  // to say anything else, is found to be so block by block.
  LogSumExp<Scalar> total{Limits::lowest(), 0.0};
  total.raise_max(hint);
  total.raise_max(first_z(logits, largest_of(x, std::min(n, kFirstLook))));
  Scalar largest = hint;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = std::min(kBlock, n - i);
    BlockSum<Scalar> block = sum_block(x + i, length, logits, total.max);
    if (static_cast<double>(block.largest) > static_cast<double>(total.max) + kSlack) {
      total.raise_max(block.largest);
      block = sum_block(x + i, length, logits, total.max);
    }
    total.add_terms(block.sum);
    largest = block.largest > largest ? block.largest : largest;
  }
  total.raise_max(largest);
  const bool is_empty = total.sum == 0.0 && largest == -Limits::infinity();
  return {static_cast<double>(is_empty ? largest : total.max), total.sum};
}

template <bool kStreaming, typename T, class Logits>
void scaled_exp(const T* x, int64_t n, const Logits& logits, Compute<T> max, Compute<T> factor,
                T* dx) {
  using V = Vec<Compute<T>>;
  constexpr int kVectors = 2 * kPairsPerStep;
  const ScaledExp<Compute<T>> exp(factor);
  // NaN times 2^-inf would be 0: of a factor that is NaN, no element may get as far as that.
  const V shift(factor == factor ? max : factor);
  const auto to_gradient = [&](V(&lanes)[kVectors]) {
    V slope[kVectors];
    SIMPO_EACH lanes[k] = logits.z(lanes[k]);
    SIMPO_EACH slope[k] = logits.own_slope(lanes[k]);
    SIMPO_EACH lanes[k] = lanes[k] - shift;
    exp.apply(lanes);
    SIMPO_EACH lanes[k] = lanes[k] * slope[k];
  };
  // By way of a buffer, so that nothing outside is touched.
  const auto some = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t count = std::min(kStep<T>, end - begin);
      T buffer[kStep<T>] = {};
      std::copy_n(x + begin, count, buffer);
      V lanes[kVectors];
      SIMPO_EACH lanes[k] = load(buffer + k * V::kSize);
      to_gradient(lanes);
      for (int k = 0; k < kVectors; k += 2) {
        store_pair<false>(buffer + k * V::kSize, lanes[k], lanes[k + 1]);
      }
      std::copy_n(buffer, count, dx + begin);
      begin += count;
    }
  };
  int64_t i = 0;
  if constexpr (kStreaming) {
    const int64_t misaligned = reinterpret_cast<intptr_t>(dx) % kVectorBytes;
    const int64_t head = misaligned == 0 ? 0 : (kVectorBytes - misaligned) / int64_t{sizeof(T)};
    i = std::min(head, n);
    some(0, i);
  }
  for (; i + kStep<T> <= n; i += kStep<T>) {
    prefetch_step(x + i);
    V lanes[kVectors];
    SIMPO_EACH lanes[k] = load(x + i + k * V::kSize);
    to_gradient(lanes);
    for (int k = 0; k < kVectors; k += 2) {
      store_pair<kStreaming>(dx + i + k * V::kSize, lanes[k], lanes[k + 1]);
    }
  }
  some(i, n);
  if constexpr (kStreaming) finish_streaming();
}

// Calls function(x as T*, logits) for what is known at run time of both.
template <typename Function>
void dispatch(DType dtype, LogitTransform transform, const void* x, const Function& function) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using Scalar = Compute<T>;
    const T* elements = static_cast<const T*>(x);
    if (transform.softcap != 0.0) {
      function(elements, CappedLogits<Scalar>(transform));
    } else if (transform.logit_scale != 1.0) {
      function(elements, ScaledLogits<Scalar>(transform));
    } else {
      function(elements, PlainLogits<Scalar>(transform));
    }
  });
}

constexpr RowKernels make_row_kernels(const char* capability) {
  return {
      .capability = capability,
      .z =
          [](DType dtype, LogitTransform transform, const void* x) {
            double z = 0.0;
            dispatch(dtype, transform, x, [&](const auto* element, const auto& logits) {
              z = static_cast<double>(first_z(logits, widen(*element)));
            });
            return z;
          },
      .sum_exp =
          [](DType dtype, LogitTransform transform, const void* x, int64_t n, double hint) {
            RunSum sum{};
            dispatch(dtype, transform, x, [&]<typename T>(const T* row, const auto& logits) {
              sum = sum_exp(row, n, logits, static_cast<Compute<T>>(hint));
            });
            return sum;
          },
      .scaled_exp =
          [](DType dtype, LogitTransform transform, const void* x, int64_t n, double max,
             double factor, void* dx, bool streaming) {
            dispatch(dtype, transform, x,
                     [&]<typename T, class Logits>(const T* row, const Logits& logits) {
                       const auto pass =
                           streaming ? scaled_exp<true, T, Logits> : scaled_exp<false, T, Logits>;
                       pass(row, n, logits, static_cast<Compute<T>>(max),
                            static_cast<Compute<T>>(factor), static_cast<T*>(dx));
                     });
          },
  };
}

}  // namespace

}  // namespace SIMPO_ISA
}  // namespace simpo_ext::cpu
