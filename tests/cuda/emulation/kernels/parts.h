// Calls of token_logps and its backward for parts of a batch's vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "core/kernels.h"
#include "kernels/buffers.h"
#include "kernels/token_batch.h"

namespace simpo_ext::kernel_tests {

// Part i of the vocabulary is [cuts[i], cuts[i + 1]).
using Cuts = std::vector<int64_t>;

inline Cuts cuts_of(int64_t V, int64_t width) {
  Cuts cuts;
  for (int64_t first = 0; first < V; first += width) cuts.push_back(first);
  cuts.push_back(V);
  return cuts;
}

template <typename Logit, typename Scalar = Compute<Logit>>
TokenLogpsArgs forward_args(const TokenBatch<Logit>& batch, const Cuts& cuts, size_t part,
                            const Buffer<Scalar>& max, const Buffer<double>& sum_exp,
                            const Buffer<Scalar>& label_z) {
  TokenLogpsArgs args = batch.unshared_forward_args();
  args.V = cuts[part + 1] - cuts[part];
  args.logits = batch.logits.data() + cuts[part];
  args.logps = nullptr;
  args.max = max.data();
  args.sum_exp = sum_exp.data();
  args.first_label = cuts[part];
  args.num_labels = batch.shape.V;
  args.continues = part > 0;
  args.label_z = label_z.data();
  return args;
}

template <typename Logit, typename Scalar = Compute<Logit>>
TokenLogpsBackwardArgs backward_args(const TokenBatch<Logit>& batch, const Cuts& cuts, size_t part,
                                     const Buffer<Scalar>& max, const Buffer<double>& sum_exp,
                                     const Rows<Logit>& dlogits,
                                     const Buffer<Scalar>& label_gradients) {
  TokenLogpsBackwardArgs args = batch.backward_args(dlogits);
  args.V = cuts[part + 1] - cuts[part];
  args.logits = batch.logits.data() + cuts[part];
  args.max = max.data();
  args.sum_exp = sum_exp.data();
  args.dlogits = dlogits.data() + cuts[part];
  args.first_label = cuts[part];
  args.num_labels = batch.shape.V;
  args.label_gradients = label_gradients.data();
  return args;
}

}  // namespace simpo_ext::kernel_tests
