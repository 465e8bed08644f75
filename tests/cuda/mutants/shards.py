"""Bugs in the CUDA kernels of a sharded vocabulary."""

from __future__ import annotations

from mutants import Mutant

SHARDS = "cuda/vocab_shards.cu"
LOGSUMEXP = "core/logsumexp.h"

SHARDS_MUTANTS = (
    Mutant(
        "the first shard left out",
        SHARDS,
        "    for (int64_t first = 0; first < args.K; first += kShardsInFlight) {",
        "    for (int64_t first = 1; first < args.K; first += kShardsInFlight) {",
        "vocab_shards",
    ),
    Mutant(
        "the shards after the first four left out",
        SHARDS,
        "    for (int64_t first = 0; first < args.K; first += kShardsInFlight) {",
        "    for (int64_t first = 0; first < 1; first += kShardsInFlight) {",
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
)
