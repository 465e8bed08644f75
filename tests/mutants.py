"""Bugs to plant in the CUDA kernels, one at a time, and what has to find each of them.

A mutant replaces a piece of source that stands in its file once. ``build`` is the build of
cuda_emulation/kernels that finds it, and ``section`` what the program has to run for that.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc
    original: str
    mutated: str
    section: str
    build: str = "plain"  # or asan or tsan


TOKENS = "cuda/token_logps.cuh"
ROWS = "cuda/rows.h"
WARP = "cuda/warp.h"
SUMS = "cuda/sequence_sums.cuh"
LOSS = "cuda/preference_loss.cu"
HIDDEN = "cuda/token_rows.cu"
REPORT = "cuda/row_report.cuh"
SHARDS = "cuda/vocab_shards.cu"
LOGSUMEXP = "core/logsumexp.h"

MUTANTS = (
    # ---- every barrier there is, removed: races
    Mutant(
        "no barrier before the sums of the warps are read",
        TOKENS,
        "    warp_sums[warp] = of_my_warp.sum;\n  }\n  __syncthreads();\n",
        "    warp_sums[warp] = of_my_warp.sum;\n  }\n",
        "values",
        "tsan",
    ),
    Mutant(
        "no barrier before the tokens' sums of the warps are read",
        SUMS,
        "put_words(partial, of_warps + warp * kWords);\n  __syncthreads();\n",
        "put_words(partial, of_warps + warp * kWords);\n",
        "preference",
        "tsan",
    ),
    Mutant(
        "no barrier before another thread's totals are read",
        LOSS,
        "    put_words(totals, of_threads + tid * kWords);\n    __syncthreads();\n",
        "    put_words(totals, of_threads + tid * kWords);\n",
        "preference",
        "tsan",
    ),
    Mutant(
        "no barrier before totals that are being read are overwritten",
        LOSS,
        "(tid + distance) * kWords));\n    }\n    __syncthreads();\n",
        "(tid + distance) * kWords));\n    }\n",
        "preference",
        "tsan",
    ),
    Mutant(
        "no barrier before the pair counts of the warps are read",
        LOSS,
        "= mine.num_chosen_tokens;\n  }\n  __syncthreads();\n",
        "= mine.num_chosen_tokens;\n  }\n",
        "preference",
        "tsan",
    ),
    Mutant(
        "no barrier before the token counts of the warps are read",
        HIDDEN,
        "    if (lane == 0) counts[warp] = of_my_warp.all;\n    __syncthreads();\n",
        "    if (lane == 0) counts[warp] = of_my_warp.all;\n",
        "token_rows",
        "tsan",
    ),
    Mutant(
        "token counts written where those of the turn before may still be read",
        HIDDEN,
        "    counts = counts == of_warps ? of_warps + kWarps : of_warps;\n",
        "",
        "token_rows",
        "tsan",
    ),
    Mutant(
        "no barrier before the reports of the warps are read",
        REPORT,
        "    report_sums[3 * warp + 2] = report.sum_exp_z;\n  }\n  __syncthreads();\n",
        "    report_sums[3 * warp + 2] = report.sum_exp_z;\n  }\n",
        "report",
        "tsan",
    ),
    # ---- barriers and shuffles that not all threads reach
    Mutant(
        "a barrier only some threads reach",
        TOKENS,
        "    warp_sums[warp] = of_my_warp.sum;\n  }\n  __syncthreads();\n",
        "    warp_sums[warp] = of_my_warp.sum;\n    __syncthreads();\n  }\n",
        "values",
    ),
    Mutant(
        "a shuffle only half a warp reaches",
        TOKENS,
        "  if (warp == 0) {\n    if (lane < kWarps)",
        "  if (warp == 0 && lane < 16) {\n    if (lane < kWarps)",
        "values",
    ),
    Mutant(
        "a shuffle that leaves out every other distance",
        WARP,
        "  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {\n"
        "    value = combine(value, __shfl",
        "  for (int distance = kWarpSize / 2; distance > 0; distance /= 4) {\n"
        "    value = combine(value, __shfl",
        "values",
    ),
    # ---- shared memory
    Mutant(
        "shared memory read that no warp has written",
        TOKENS,
        "    if (lane < kWarps) of_block = {",
        "    if (lane <= kWarps) of_block = {",
        "values",
        "asan",
    ),
    Mutant(
        "stale shared memory: the last warp's sum is not written",
        TOKENS,
        "  if (lane == 0) {\n    warp_maxima[warp]",
        "  if (lane == 0 && warp + 1 < kWarps) {\n    warp_maxima[warp]",
        "values",
    ),
    Mutant(
        "a shared array one entry short",
        TOKENS,
        "SIMPO_SHARED(double, warp_sums, kWarps);",
        "SIMPO_SHARED(double, warp_sums, kWarps - 1);",
        "values",
        "asan",
    ),
    # ---- offsets and grids
    Mutant(
        "32-bit offset of a row of logits, forward",
        TOKENS,
        "  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, "
        "token.t);\n  const int64_t column",
        "  const T* x = static_cast<const T*>(args.logits) + static_cast<int32_t>("
        "args.logits_strides.offset(token.b, token.t));\n  const int64_t column",
        "offsets",
    ),
    Mutant(
        "32-bit offset of a row of logits, backward",
        TOKENS,
        "  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, "
        "token.t);\n  const Scalar common_grad",
        "  const T* x = static_cast<const T*>(args.logits) + static_cast<int32_t>("
        "args.logits_strides.offset(token.b, token.t));\n  const Scalar common_grad",
        "offsets",
    ),
    Mutant(
        "32-bit offset of a row of gradients",
        TOKENS,
        "  T* dx = static_cast<T*>(args.dlogits) + args.dlogits_strides.offset(token.b, token.t);",
        "  T* dx = static_cast<T*>(args.dlogits) + "
        "static_cast<int32_t>(args.dlogits_strides.offset(token.b, token.t));",
        "offsets",
    ),
    Mutant(
        "the second grid dimension ignored",
        ROWS,
        "  return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;",
        "  return blockIdx.x;",
        "values",
    ),
    Mutant(
        "rows beyond the last one, forward",
        TOKENS,
        "  if (row >= targets.B * targets.T) return;\n  const Token token = "
        "token_of_row(row, targets.T);\n  const bool is_part",
        "  const Token token = token_of_row(row, targets.T);\n  const bool is_part",
        "values",
        "asan",
    ),
    # ---- the cut of a row into vectors
    Mutant(
        "the head of a row not peeled",
        ROWS,
        "    head_ = to_boundary < V ? to_boundary : V;",
        "    head_ = 0;",
        "values",
    ),
    Mutant(
        "the tail of a row lost",
        ROWS,
        "num_edges() const { return V_ - num_vectors_ * kWidth; }",
        "num_edges() const { return head_; }",
        "values",
    ),
    Mutant(
        "one edge too many",
        ROWS,
        "num_edges() const { return V_ - num_vectors_ * kWidth; }",
        "num_edges() const { return V_ - num_vectors_ * kWidth + 1; }",
        "values",
        "asan",
    ),
    Mutant(
        "a batch of loads too many, forward",
        TOKENS,
        "i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {\n    add_vectors",
        "i + (kUnroll - 1) * kThreads <= num_vectors; i += kUnroll * kThreads) {\n    add_vectors",
        "values",
        "asan",
    ),
    Mutant(
        "the last batch of loads lost, backward",
        TOKENS,
        "    if (i < num_vectors) {\n      write_vectors",
        "    if (i + kThreads < num_vectors) {\n      write_vectors",
        "values",
    ),
    Mutant(
        "rows taken for aligned alike",
        TOKENS,
        "      (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 == 0;",
        "      true;",
        "values",
    ),
    # ---- labels
    Mutant(
        "a label out of range followed",
        ROWS,
        "  return static_cast<uint64_t>(label) < static_cast<uint64_t>(V);",
        "  return true;",
        "values",
        "asan",
    ),
    Mutant(
        "the label V taken for one of the vocabulary",
        ROWS,
        "  return static_cast<uint64_t>(label) < static_cast<uint64_t>(V);",
        "  return static_cast<uint64_t>(label) <= static_cast<uint64_t>(V);",
        "values",
        "asan",
    ),
    Mutant(
        "the label's gradient lost in head and tail",
        ROWS,
        "    return element - num_vectors_ * kWidth;\n",
        "    return -1;\n",
        "values",
    ),
    Mutant(
        "the label's logit read after it was overwritten",
        TOKENS,
        "    const Scalar label_z = logits.z(label_x);\n",
        "    const Scalar label_z = logits.z(Elements<T>::widen(load(x + column)));\n",
        "values",
    ),
    Mutant(
        "the label's gradient written by a thread that another overwrites",
        TOKENS,
        "      tid == (is_aligned_alike ? cut.thread_of_element(column, kThreads) : "
        "column % kThreads);",
        "      tid == 0;",
        "values",
        "tsan",
    ),
    # ---- what is read and written
    Mutant(
        "masked rows read",
        TOKENS,
        "  if (label == targets.ignore_index || !is_in_vocabulary(label, args.num_labels)) {\n"
        "    if (tid == 0) {\n",
        "  if (label == targets.ignore_index || !is_in_vocabulary(label, args.num_labels)) {\n"
        "    load(static_cast<const T*>(args.logits) + "
        "args.logits_strides.offset(token.b, token.t));\n    if (tid == 0) {\n",
        "bytes",
    ),
    Mutant(
        "rows without a gradient read",
        TOKENS,
        "  if (grad == Scalar(0)) {\n    fill_row",
        "  if (is_masked) {\n    fill_row",
        "bytes",
    ),
    Mutant(
        "masked rows left as they were",
        ROWS,
        "  for (int64_t i = tid; i < cut.num_vectors(); i += kThreads)\n"
        "    store_streaming(cut.vectors(row) + i, v);\n",
        "",
        "values",
    ),
    Mutant(
        "every vector loaded twice",
        TOKENS,
        "  Vector16 maxima = v[0];\n",
        "  Vector16 maxima = load_streaming(vectors + first);\n",
        "bytes",
    ),
    # ---- the running maximum
    Mutant(
        "the sum not rescaled when the maximum rises",
        TOKENS,
        "    sum.sum *= static_cast<double>(fast_exp(sum.max - new_max));\n",
        "",
        "values",
    ),
    Mutant(
        "a row that begins with -inf is NaN",
        "core/logsumexp.h",
        "    return max == -std::numeric_limits<Scalar>::infinity() ? Scalar(0) : max;",
        "    return max;",
        "values",
    ),
    Mutant(
        "absent vectors count as zeros in the maximum",
        TOKENS,
        ": minus_infinities<T>();",
        ": Vector16{{0, 0, 0, 0}};",
        "values",
    ),
    # ---- what is reported of a row
    Mutant(
        "the report not moved when the maximum rises",
        TOKENS,
        "    if (largest > sum.max) move_report(report, sum, largest);\n",
        "",
        "report",
    ),
    Mutant(
        "the report of an edge not moved when the maximum rises",
        TOKENS,
        "      if (z > sum.max) move_report(report, sum, z);\n",
        "",
        "report",
    ),
    Mutant(
        "an entropy of NaN where a logit is -inf",
        REPORT,
        "term * larger(std::numeric_limits<Scalar>::lowest(), distance);",
        "term * distance;",
        "report",
    ),
    Mutant(
        "an empty sum moved to NaN",
        REPORT,
        "      scale == 0.0 ? 0.0 : scale * (",
        "      scale * (",
        "report",
    ),
    Mutant(
        "the mean without what was subtracted",
        REPORT,
        "static_cast<double>(count) * static_cast<double>(reference) +",
        "0.0 * static_cast<double>(reference) +",
        "report",
    ),
    Mutant(
        "masked rows read without being asked for",
        REPORT,
        "  if (!is_masked || !args.all_positions) {",
        "  if (!is_masked) {",
        "report",
    ),
    Mutant(
        "the report of the parts before forgotten",
        TOKENS,
        "    if (kReports && args.continues) {",
        "    if (false) {",
        "report",
    ),
    Mutant(
        "the mean of a masked row without the parts before",
        REPORT,
        "  if (args.continues) report.sum_z += load(args.mean_logit + row);\n",
        "",
        "report",
    ),
    # ---- parts of the vocabulary
    Mutant(
        "the parts before forgotten",
        TOKENS,
        "    if (args.continues) sum = {load(max), load(sum_exp)};\n",
        "",
        "parts",
    ),
    Mutant(
        "the parts before counted once for each thread",
        TOKENS,
        "  if (tid == 0) {\n    if (has_label) label_x = load(x + column);\n"
        "    if (args.continues) sum",
        "  if (tid == 0 && has_label) label_x = load(x + column);\n  {\n"
        "    if (args.continues) sum",
        "parts",
    ),
    Mutant(
        "a label of another part taken for one out of range, forward",
        TOKENS,
        "  if (label == targets.ignore_index || !is_in_vocabulary(label, args.num_labels)) {",
        "  if (label == targets.ignore_index || !is_in_vocabulary(label, args.V)) {",
        "parts",
    ),
    Mutant(
        "a label of another part taken for one out of range, backward",
        TOKENS,
        "  const bool is_scored = !is_masked && is_in_vocabulary(label, args.num_labels);",
        "  const bool is_scored = !is_masked && is_in_vocabulary(label, args.V);",
        "parts",
    ),
    Mutant(
        "a label of another part followed, forward",
        TOKENS,
        "    if (has_label) label_x = load(x + column);",
        "    label_x = load(x + column);",
        "bytes",
    ),
    Mutant(
        "a label of another part followed, backward",
        TOKENS,
        "      has_label &&\n      tid ==",
        "      tid ==",
        "parts",
    ),
    Mutant(
        "the label's z lost in the parts behind",
        TOKENS,
        "    } else if (has_label || !args.continues) {",
        "    } else {",
        "parts",
    ),
    Mutant(
        "the label's z not set before its part",
        TOKENS,
        "    } else if (has_label || !args.continues) {",
        "    } else if (has_label) {",
        "parts",
    ),
    Mutant(
        "the label's gradient left among the others",
        TOKENS,
        "row_of_block(), value);\n      value = 0;\n",
        "row_of_block(), value);\n",
        "parts",
    ),
    Mutant(
        "the label's gradient rounded",
        TOKENS,
        "row_of_block(), value);\n      value = 0;\n",
        "row_of_block(), Elements<T>::widen(Elements<T>::narrow(value)));\n      value = 0;\n",
        "parts",
    ),
    Mutant(
        "no label's gradient of rows without one",
        TOKENS,
        "    if (tid == 0 && has_label && args.label_gradients != nullptr) {",
        "    if (false) {",
        "parts",
    ),
    Mutant(
        "a label's gradient of rows without one from every part",
        TOKENS,
        "    if (tid == 0 && has_label && args.label_gradients != nullptr) {",
        "    if (tid == 0 && is_scored && args.label_gradients != nullptr) {",
        "parts",
    ),
    # ---- rows of hidden states
    Mutant(
        "tokens of the lanes before not counted",
        WARP,
        "    if ((lane & distance) != 0) sum.before += other;\n",
        "",
        "token_rows",
    ),
    Mutant(
        "tokens of the warps before not counted",
        HIDDEN,
        "__shfl_sync(kWholeWarp, of_block.before, warp) + of_my_warp.before;",
        "of_my_warp.before;",
        "token_rows",
    ),
    Mutant(
        "tokens of the turns before not counted",
        HIDDEN,
        "    num_selected += of_block.all;\n",
        "    num_selected = of_block.all;\n",
        "token_rows",
    ),
    Mutant(
        "more tokens selected than there are rows",
        HIDDEN,
        "      if (row < args.R) {\n",
        "      if (row <= args.R) {\n",
        "token_rows",
        "asan",
    ),
    Mutant(
        "rows without a token left as they were",
        HIDDEN,
        "  for (int64_t row = num_selected + tid; row < args.R; row += kSelectThreads) {",
        "  for (int64_t row = num_selected + tid; row < num_selected; row += kSelectThreads) {",
        "token_rows",
    ),
    Mutant(
        "the next sequence's tokens taken for this one's",
        HIDDEN,
        "      token = token.t + 1 < targets.T ? Token{token.b, token.t + 1} "
        ": Token{token.b + 1, 0};\n",
        "      token = Token{token.b, token.t + 1};\n",
        "token_rows",
    ),
    Mutant(
        "rows beyond the last one, gathered",
        HIDDEN,
        "  if (row >= args.R) return;\n  const int64_t position = load_uniform",
        "  const int64_t position = load_uniform",
        "token_rows",
        "asan",
    ),
    Mutant(
        "a row without a token gathered",
        HIDDEN,
        "  if (position < 0) {\n    fill_row<T, kRowThreads>(to, args.H, 0);\n    return;\n  }\n",
        "",
        "token_rows",
        "asan",
    ),
    Mutant(
        "rows taken for aligned alike, gathered",
        HIDDEN,
        "  if ((reinterpret_cast<uintptr_t>(from) - reinterpret_cast<uintptr_t>(to)) % 16 != 0) {",
        "  if (false) {",
        "token_rows",
    ),
    Mutant(
        "32-bit offset of a gathered row",
        HIDDEN,
        "static_cast<const T*>(args.source) + args.source_strides.offset(token.b, token.t);\n"
        "  const int64_t tid",
        "static_cast<const T*>(args.source) + "
        "static_cast<int32_t>(args.source_strides.offset(token.b, token.t));\n"
        "  const int64_t tid",
        "offsets",
    ),
    Mutant(
        "32-bit offset of a row of the weight",
        HIDDEN,
        "static_cast<const T*>(args.weight) + label * args.weight_stride_v,",
        "static_cast<const T*>(args.weight) + static_cast<int32_t>(label * args.weight_stride_v),",
        "offsets",
    ),
    Mutant(
        "logps written for rows without a token",
        HIDDEN,
        "  if (position < 0) return;\n  const LogSumExp",
        "  const LogSumExp",
        "token_rows",
        "asan",
    ),
    Mutant(
        "a gradient put where the ignored label is one of the vocabulary",
        HIDDEN,
        "  if (label == args.ignore_index || !is_in_part",
        "  if (!is_in_part",
        "token_rows",
    ),
    Mutant(
        "a gradient put into every part",
        ROWS,
        "  return static_cast<uint64_t>(label) - static_cast<uint64_t>(first_label) <\n"
        "         static_cast<uint64_t>(V);",
        "  return first_label <= label;",
        "token_rows",
    ),
    Mutant(
        "the elements behind the last vector not added",
        HIDDEN,
        "    done += num_vectors * kWidth;\n",
        "    done = end;\n",
        "token_rows",
    ),
    Mutant(
        "a batch of vectors taken for whole",
        HIDDEN,
        "    if (end - begin == kElements) {",
        "    if (true) {",
        "token_rows",
        "asan",
    ),
    Mutant(
        "a sum taken for aligned, when adding",
        HIDDEN,
        "  if (is_aligned(partial) && is_aligned(sum)) {",
        "  if (is_aligned(partial)) {",
        "token_rows",
    ),
    Mutant(
        "a sum taken for aligned, in the last addition",
        HIDDEN,
        "                           is_aligned(row.sum) && is_aligned(row.weight)",
        "                           is_aligned(row.weight)",
        "token_rows",
    ),
    Mutant(
        "the weight taken for contiguous in H",
        HIDDEN,
        "has_vectors = row.weight_stride == 1 && ",
        "has_vectors = ",
        "token_rows",
    ),
    Mutant(
        "a label out of range followed to the weight",
        HIDDEN,
        "  if (!is_in_vocabulary(label, args.num_labels)) {\n    fill_row",
        "  if (label < 0) {\n    fill_row",
        "token_rows",
        "asan",
    ),
    Mutant(
        "the weight's row loaded twice",
        HIDDEN,
        "    Compute<T> values[kWidth];\n",
        "    weight[u] = load_streaming(reinterpret_cast<const Vector16*>(row.weight) + i);\n"
        "    Compute<T> values[kWidth];\n",
        "bytes",
    ),
    # ---- a vocabulary in shards
    Mutant(
        "the first shard left out",
        SHARDS,
        "    for (int64_t k = 0; k < args.K; ++k) {",
        "    for (int64_t k = 1; k < args.K; ++k) {",
        "vocab_shards",
    ),
    Mutant(
        "one of a label's two shards believed",
        LOGSUMEXP,
        "    has_two_labels = has_two_labels || label_z == label_z;\n",
        "",
        "vocab_shards",
    ),
    Mutant(
        "the label's z of a shard that has it not",
        LOGSUMEXP,
        "    if (z != z) return;\n",
        "",
        "vocab_shards",
    ),
    Mutant(
        "merged logps written for rows without a token",
        SHARDS,
        "  } else if (!is_masked) {\n    store",
        "  } else {\n    store",
        "vocab_shards",
        "asan",
    ),
    Mutant(
        "shards of a masked row read",
        SHARDS,
        "  if (!is_masked) {\n    ShardedRow",
        "  {\n    ShardedRow",
        "vocab_shards",
    ),
    Mutant(
        "a label's share added on every shard",
        SHARDS,
        "  if (label == args.ignore_index || !is_in_part(label, args.first_label, args.V)) return;",
        "  if (label == args.ignore_index || label < args.first_label) return;",
        "vocab_shards",
        "asan",
    ),
    Mutant(
        "a share added where the ignored label is one of the vocabulary",
        SHARDS,
        "  if (label == args.ignore_index || !is_in_part",
        "  if (!is_in_part",
        "vocab_shards",
    ),
    Mutant(
        "the shard's weight taken for the whole",
        SHARDS,
        "(label - args.first_label) * args.weight_stride_v",
        "label * args.weight_stride_v",
        "vocab_shards",
        "asan",
    ),
    Mutant(
        "the shard's weight taken for contiguous in H",
        SHARDS,
        "load(weight + h * args.weight_stride_h)",
        "load(weight + h)",
        "vocab_shards",
    ),
    Mutant(
        "rows without a token scattered",
        SHARDS,
        "  if (position < 0) return;\n",
        "",
        "vocab_shards",
        "asan",
    ),
    # ---- sequences and pairs
    Mutant(
        "pairs beyond the first block of threads lost",
        LOSS,
        "  for (int64_t p = tid; p < P; p += kPairThreads) {\n    const ScoredPair",
        "  for (int64_t p = tid; p < P; p += P) {\n    const ScoredPair",
        "preference",
    ),
    Mutant(
        "one warp's tokens lost",
        SUMS,
        "    for (int i = 1; i < kWarps; ++i) {",
        "    for (int i = 2; i < kWarps; ++i) {",
        "preference",
    ),
    Mutant(
        "gradient at masked tokens",
        SUMS,
        "is_valid_token(targets, b, t) ? value : Scalar(0));",
        "value);",
        "preference",
    ),
)
