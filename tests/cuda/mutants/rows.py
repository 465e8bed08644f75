"""Bugs in the CUDA kernels around hidden states: tokens to rows and back."""

from __future__ import annotations

from mutants import ROWS, WARP, Mutant

SELECT = "cuda/select_tokens.cu"
GATHER = "cuda/gather_rows.cu"
LABELS = "cuda/label_values.cu"
HIDDEN = "cuda/hidden_gradient.cu"

ROWS_MUTANTS = (
    # ---- removed barriers: races
    Mutant(
        "no barrier before the token counts of the warps are read",
        SELECT,
        "    if (lane == 0) counts[warp] = of_my_warp.all;\n    __syncthreads();\n",
        "    if (lane == 0) counts[warp] = of_my_warp.all;\n",
        "token_rows",
        "tsan",
    ),
    Mutant(
        "token counts written where those of the turn before may still be read",
        SELECT,
        "    counts = counts == of_warps ? of_warps + kWarps : of_warps;\n",
        "",
        "token_rows",
        "tsan",
    ),
    # ---- selected, gathered and added values
    Mutant(
        "tokens of the lanes before not counted",
        WARP,
        "    if ((lane & distance) != 0) sum.before += other;\n",
        "",
        "token_rows",
    ),
    Mutant(
        "tokens of the warps before not counted",
        SELECT,
        "__shfl_sync(kWholeWarp, of_block.before, warp) + of_my_warp.before;",
        "of_my_warp.before;",
        "token_rows",
    ),
    Mutant(
        "tokens of the turns before not counted",
        SELECT,
        "    num_selected += of_block.all;\n",
        "    num_selected = of_block.all;\n",
        "token_rows",
    ),
    Mutant(
        "more tokens selected than there are rows",
        SELECT,
        "      if (row < args.R) {\n",
        "      if (row <= args.R) {\n",
        "token_rows",
        "asan",
    ),
    Mutant(
        "rows without a token left as they were",
        SELECT,
        "  for (int64_t row = num_selected + tid; row < args.R; row += kSelectThreads) {",
        "  for (int64_t row = num_selected + tid; row < num_selected; row += kSelectThreads) {",
        "token_rows",
    ),
    Mutant(
        "the next sequence's tokens taken for this one's",
        SELECT,
        "      token = token.t + 1 < targets.T ? Token{token.b, token.t + 1} "
        ": Token{token.b + 1, 0};\n",
        "      token = Token{token.b, token.t + 1};\n",
        "token_rows",
    ),
    Mutant(
        "rows beyond the last one, gathered",
        GATHER,
        "  if (row >= args.R) return;\n  const int64_t position = load_uniform",
        "  const int64_t position = load_uniform",
        "token_rows",
        "asan",
    ),
    Mutant(
        "a row without a token gathered",
        GATHER,
        "  if (!has_part<T>(args, row, position, load_gradient)) {\n"
        "    fill_row<T, kRowThreads>(to, args.H, 0);\n    return;\n  }\n",
        "",
        "token_rows",
        "asan",
    ),
    Mutant(
        "a row without a gradient gathered",
        GATHER,
        "  if (args.gradients == nullptr) return true;\n",
        "  return true;\n",
        "token_rows",
    ),
    Mutant(
        "rows taken for aligned alike, gathered",
        GATHER,
        "  if ((reinterpret_cast<uintptr_t>(from) - reinterpret_cast<uintptr_t>(to)) % 16 != 0) {",
        "  if (false) {",
        "token_rows",
    ),
    Mutant(
        "32-bit offset of a gathered row",
        GATHER,
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
        LABELS,
        "  if (position < 0) return;\n  const LogSumExp",
        "  const LogSumExp",
        "token_rows",
        "asan",
    ),
    Mutant(
        "a gradient put where the ignored label is one of the vocabulary",
        LABELS,
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
)
