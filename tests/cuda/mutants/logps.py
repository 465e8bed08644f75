"""Bugs in the CUDA kernels of token log-probs."""

from __future__ import annotations

from mutants import BACKWARD, FORWARD, ROWS, WARP, Mutant

LOGPS_MUTANTS = (
    # ---- removed barriers: races
    Mutant(
        "no barrier before the sums of the warps are read",
        FORWARD,
        "    warp_sums[warp] = of_my_warp.sum;\n  }\n  __syncthreads();\n",
        "    warp_sums[warp] = of_my_warp.sum;\n  }\n",
        "values",
        "tsan",
    ),
    # ---- barriers and shuffles that some threads do not reach
    Mutant(
        "a barrier only some threads reach",
        FORWARD,
        "    warp_sums[warp] = of_my_warp.sum;\n  }\n  __syncthreads();\n",
        "    warp_sums[warp] = of_my_warp.sum;\n    __syncthreads();\n  }\n",
        "values",
    ),
    Mutant(
        "a shuffle only half a warp reaches",
        FORWARD,
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
        FORWARD,
        "    if (lane < kWarps) of_block = {",
        "    if (lane <= kWarps) of_block = {",
        "values",
        "asan",
    ),
    Mutant(
        "stale shared memory: the last warp's sum is not written",
        FORWARD,
        "  if (lane == 0) {\n    warp_maxima[warp]",
        "  if (lane == 0 && warp + 1 < kWarps) {\n    warp_maxima[warp]",
        "values",
    ),
    Mutant(
        "a shared array one entry short",
        FORWARD,
        "SIMPO_SHARED(double, all_sums, 2 * kWarps);",
        "SIMPO_SHARED(double, all_sums, kWarps - 1);",
        "values",
        "asan",
    ),
    # ---- offsets and grids
    Mutant(
        "32-bit offset of a row of logits, forward",
        FORWARD,
        "  const T* x = static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, "
        "token.t);\n",
        "  const T* x = static_cast<const T*>(args.logits) + static_cast<int32_t>("
        "args.logits_strides.offset(token.b, token.t));\n",
        "offsets",
    ),
    Mutant(
        "32-bit offset of a row of logits, backward",
        BACKWARD,
        "static_cast<const T*>(args.logits) + args.logits_strides.offset(token.b, token.t) +",
        "static_cast<const T*>(args.logits) + "
        "static_cast<int32_t>(args.logits_strides.offset(token.b, token.t)) +",
        "offsets",
    ),
    Mutant(
        "32-bit offset of a row of gradients",
        BACKWARD,
        "static_cast<T*>(args.dlogits) + args.dlogits_strides.offset(token.b, token.t) +",
        "static_cast<T*>(args.dlogits) + "
        "static_cast<int32_t>(args.dlogits_strides.offset(token.b, token.t)) +",
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
        FORWARD,
        "  if (row >= targets.B * targets.T) return;\n  const Token token = "
        "token_of_row(row, targets.T);\n  const bool is_part",
        "  const Token token = token_of_row(row, targets.T);\n  const bool is_part",
        "values",
        "asan",
    ),
    # ---- vectors of a row
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
        FORWARD,
        "i + (kUnroll - 1) * kThreads < num_vectors; i += kUnroll * kThreads) {\n    add_vectors",
        "i + (kUnroll - 1) * kThreads <= num_vectors; i += kUnroll * kThreads) {\n    add_vectors",
        "values",
        "asan",
    ),
    Mutant(
        "the last batch of loads lost, backward",
        BACKWARD,
        "    if (i < num_vectors) {\n      write_vectors",
        "    if (i + kThreads < num_vectors) {\n      write_vectors",
        "values",
    ),
    Mutant(
        "rows taken for aligned alike",
        BACKWARD,
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
        BACKWARD,
        "    const Scalar label_z = transformed(logits, label_x);\n",
        "    const Scalar label_z = transformed(logits, Elements<T>::widen(load(x + column)));\n",
        "values",
    ),
    Mutant(
        "the label's gradient written by a thread that another overwrites",
        BACKWARD,
        "      tid == (is_aligned_alike ? cut.thread_of_element(column, kThreads) : "
        "column % kThreads);",
        "      tid == 0;",
        "values",
        "tsan",
    ),
    # ---- reads and writes
    Mutant(
        "masked rows read",
        FORWARD,
        "    const bool is_masked = label == targets.ignore_index;\n",
        "    const bool is_masked = label == targets.ignore_index;\n"
        "    load(static_cast<const T*>(args.logits) + "
        "args.logits_strides.offset(token.b, token.t));\n",
        "bytes",
    ),
    Mutant(
        "rows without a gradient read",
        BACKWARD,
        "  if (!is_scored || grad == Scalar(0)) {\n    fill_row",
        "  if (!is_scored) {\n    fill_row",
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
        FORWARD,
        "  Vector16 maxima = v[0];\n",
        "  Vector16 maxima = load_streaming(vectors + first);\n",
        "bytes",
    ),
    # ---- the running maximum
    Mutant(
        "the sum not rescaled when the maximum rises",
        FORWARD,
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
        FORWARD,
        ": minus_infinities<T>();",
        ": Vector16{{0, 0, 0, 0}};",
        "values",
    ),
    # ---- segments of a row
    Mutant(
        "the next segment writes shared memory that is still read",
        FORWARD,
        "  double* warp_sums = all_sums + call % 2 * kWarps;",
        "  double* warp_sums = all_sums;",
        "values",
        "tsan",
    ),
    Mutant(
        "every block of a row starts at its first segment",
        ROWS,
        "    begin_ = static_cast<int>(blockIdx.z) * share;",
        "    begin_ = 0;",
        "values",
    ),
    Mutant(
        "the last segment lost where blocks have unequal shares",
        ROWS,
        "    const int share = (count_ + blocks - 1) / blocks;",
        "    const int share = count_ / blocks;",
        "values",
    ),
    Mutant(
        "a label's z in every segment of its block",
        FORWARD,
        "      const bool is_first = segment == segments.begin_of_block();",
        "      const bool is_first = true;",
        "values",
    ),
    Mutant(
        "segments not merged",
        FORWARD,
        "      so_far.merge(of_segment);\n",
        "      so_far = of_segment;\n",
        "values",
    ),
    Mutant(
        "the segments of masked rows written",
        FORWARD,
        "      if (!is_masked && tid == 0) write_segments",
        "      if (tid == 0) write_segments",
        "bytes",
    ),
    # ---- chunks of the vocabulary
    Mutant(
        "the parts before forgotten",
        FORWARD,
        "      before = {load(static_cast<const Scalar*>(args.max) + row), "
        "load(args.sum_exp + row)};\n",
        "",
        "parts",
    ),
    Mutant(
        "a label of another part taken for one out of range, forward",
        FORWARD,
        "  if (label == targets.ignore_index || !is_in_vocabulary(label, args.num_labels)) {",
        "  if (label == targets.ignore_index || !is_in_vocabulary(label, args.V)) {",
        "parts",
    ),
    Mutant(
        "a label of another part taken for one out of range, backward",
        BACKWARD,
        "  const bool is_scored = !is_masked && is_in_vocabulary(label, args.num_labels);",
        "  const bool is_scored = !is_masked && is_in_vocabulary(label, args.V);",
        "parts",
    ),
    Mutant(
        "a label of another part followed, forward",
        FORWARD,
        "    if (is_in_vocabulary(column, segments.columns_of_block())) {",
        "    {",
        "bytes",
    ),
    Mutant(
        "a label of another part followed, backward",
        BACKWARD,
        "      has_label &&\n      tid ==",
        "      tid ==",
        "parts",
    ),
    Mutant(
        "the label's z lost in the parts behind",
        FORWARD,
        "  } else if (label_z == label_z || !args.continues) {",
        "  } else {",
        "parts",
    ),
    Mutant(
        "the label's z not set before its part",
        FORWARD,
        "  } else if (label_z == label_z || !args.continues) {",
        "  } else if (label_z == label_z) {",
        "parts",
    ),
    Mutant(
        "the label's gradient left among the others",
        BACKWARD,
        "row_of_block(), value);\n      value = 0;\n",
        "row_of_block(), value);\n",
        "parts",
    ),
    Mutant(
        "the label's gradient rounded",
        BACKWARD,
        "row_of_block(), value);\n      value = 0;\n",
        "row_of_block(), Elements<T>::widen(Elements<T>::narrow(value)));\n      value = 0;\n",
        "parts",
    ),
    Mutant(
        "no label's gradient of rows without one",
        BACKWARD,
        "    if (tid == 0 && has_label && args.label_gradients != nullptr) {",
        "    if (false) {",
        "parts",
    ),
    Mutant(
        "a label's gradient of rows without one from every part",
        BACKWARD,
        "    if (tid == 0 && has_label && args.label_gradients != nullptr) {",
        "    if (tid == 0 && is_scored && args.label_gradients != nullptr) {",
        "parts",
    ),
)
