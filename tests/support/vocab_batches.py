"""All shards of a vocabulary in one process, with sums in place of the collectives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simpo_ext._ops.records import TokenOptions
from support.batches import Batch
from support.linear_batches import LinearBatch

OPS = torch.ops.simpo_ext
# A single shard, shards of one label, unaligned halves, empty shards at the ends and in between,
# and a shard for each label.
CUTS = {
    50: [(0, 50), (0, 1, 50), (0, 49, 50), (0, 23, 50), (0, 0, 17, 17, 50, 50), tuple(range(51))]
}


def token_options(
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenOptions:
    return TokenOptions(ignore_index, shift, logit_scale, softcap or 0.0)


def spans(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cuts))


def whole(batch: Batch, upstream: Tensor, options: TokenOptions) -> list[Tensor]:
    """logps, max, sum_exp and dlogits of the ops of a whole vocabulary."""
    logps, *rows = OPS.token_logps(*batch, *options)
    upstream = upstream.to(logps.dtype)
    return [logps, *rows, OPS.token_logps_backward(upstream, *batch, *rows, *options)]


def in_shards(
    batch: Batch,
    upstream: Tensor,
    options: TokenOptions,
    cuts: Sequence[int],
    in_place: bool = False,
) -> list[Tensor]:
    """The results of `whole`, computed in the shards between ``cuts``."""
    vocabulary = cuts[-1]
    # A shard is a slice, so its rows are apart in memory.
    parts = [(batch.logits[..., a:b], a) for a, b in spans(cuts)]
    stats = [
        OPS.token_logps_shard(part, batch.labels, a, vocabulary, *options) for part, a in parts
    ]
    float64 = batch.logits.dtype == torch.float64
    logps, *rows = OPS.token_logps_merge(torch.stack(stats), batch.labels, *options[:2], float64)
    upstream = upstream.to(logps.dtype)
    gradients = []
    for part, a in parts:
        args = (part.clone() if in_place else part, batch.labels, *rows, a, vocabulary, *options)
        if in_place:
            assert OPS.token_logps_shard_backward_(upstream, *args) is None
            gradients.append(args[0])
        else:
            gradients.append(OPS.token_logps_shard_backward(upstream, *args))
    return [logps, *rows, torch.cat(gradients, dim=-1)]


def linear_whole(
    batch: LinearBatch, upstream: Tensor, options: TokenOptions, budget: int = 0, count: int = -1
) -> list[Tensor]:
    """logps, max, sum_exp, and the gradients of hidden, weight and, if there is one, bias."""
    hidden, weight, labels, bias = batch
    args = hidden, weight, bias, labels
    logps, *rows, kept = OPS.linear_token_logps(*args, *options, budget, count)
    needs = (True, True, bias is not None)
    gradients = OPS.linear_token_logps_backward(
        upstream.to(logps.dtype), *args, *rows, kept, *options, *needs
    )
    return [logps, *rows, *gradients[: sum(needs)]]


def linear_in_shards(
    batch: LinearBatch,
    upstream: Tensor,
    options: TokenOptions,
    cuts: Sequence[int],
    budget: int = 0,
    count: int = -1,
) -> list[Tensor]:
    """The results of `linear_whole`, computed in the shards between ``cuts``."""
    hidden, weight, labels, bias = batch
    vocabulary, needs = cuts[-1], (True, True, bias is not None)
    parts = [
        (hidden, weight[a:b], None if bias is None else bias[a:b], labels) for a, b in spans(cuts)
    ]
    firsts = cuts[:-1]
    results = [
        OPS.linear_token_logps_shard(*part, a, vocabulary, *options, budget, count)
        for part, a in zip(parts, firsts, strict=True)
    ]
    stats = torch.stack([stats for stats, _ in results])
    float64 = hidden.dtype == torch.float64
    logps, *rows = OPS.linear_token_logps_merge(stats, labels, *options[:2], float64)
    upstream = upstream.to(logps.dtype)
    gradients: list[Any] = [
        OPS.linear_token_logps_shard_backward(
            upstream, *part, *rows, kept, a, vocabulary, *options, *needs
        )
        for part, a, (_, kept) in zip(parts, firsts, results, strict=True)
    ]
    dhidden_rows = torch.stack([rows for rows, _, _ in gradients]).sum(0)
    dhidden = OPS.linear_token_logps_dhidden(dhidden_rows, hidden, labels, *options[:2])
    dweight = torch.cat([dweight for _, dweight, _ in gradients])
    dbias = torch.cat([dbias for _, _, dbias in gradients])
    return [logps, *rows, dhidden, dweight, dbias][: 4 + sum(needs[1:])]
