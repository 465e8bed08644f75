"""The cases of first light: together they launch every kernel of csrc/cuda.

In the emulator, tests/bench/test_first_light.py checks this for each instantiation of each kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import simpo_ext
from bench.first_light_checks import Case, Given, Problem
from bench.first_light_formulas import (
    IGNORE_INDEX,
    Scored,
    reported,
    rounded_logits,
    score,
    simpo,
)
from simpo_ext.distributed import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)

SHAPE = 4, 3
LONG = 4, 1100  # more tokens than a block takes in one iteration of its loop
MANY = 4, 208  # so many rows that blocks do not share them
PAIRS = torch.tensor([[0, 2], [1, 3]])


class Layout(NamedTuple):
    """How the rows of logits lie in their allocation, in elements."""

    vocabulary: int
    offset: int
    padding: int  # between rows


LESS_THAN_A_VECTOR = Layout(7, 3, 0)
ODD = Layout(130, 1, 1)  # every row has a head and a tail, and alignments take turns
SEVERAL_SEGMENTS = Layout(40007, 3, 1)  # rows of 64 KiB and more, which several blocks share
LAYOUTS = (
    Layout(1, 1, 0),
    LESS_THAN_A_VECTOR,
    ODD,
    Layout(1000, 0, 0),  # whole vectors, all aligned
    Layout(4099, 5, 0),  # small rows that take more than one pass
    Layout(20003, 1, 2),  # rows for the kernels for large rows
    SEVERAL_SEGMENTS,
)
TRANSFORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled and capped": {"logit_scale": 0.7, "softcap": 5.0},
}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1, "sft_weight": 0.3},
    "hinge": {"loss_type": "hinge", "gamma_beta_ratio": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.5, "gamma_beta_ratio": 0.0},
    "AlphaPO": {"alpha": 0.25, "beta": 2.5, "gamma_beta_ratio": 0.2},
}
REPORTS = (("logits", "entropy"), ("logits", "logits_all", "entropy"))

# Packed sequences: one is empty, and one has a single token, which predicts nothing. The first and
# the last positions belong to no sequence.
CU_SEQLENS = torch.tensor([1, 4, 4, 9, 10, 15, 18])
NONE_EMPTY = torch.tensor([1, 4, 9, 15, 18])
PACKED = 20
WEIGHTED_PAIRS = {
    "cu_seqlens": CU_SEQLENS,
    # Sequences are in several pairs, as chosen and as rejected. The last pair has weight 0.
    "pairs": torch.tensor([[0, 2], [0, 4], [4, 5], [2, 5]]),
    "pair_weight": torch.tensor([1.5, 0.25, 1.0, 0.0], dtype=torch.float64),
}

RECOMPUTED, KEPT = 0, 2**30  # budgets
SHORT_ROWS = (2, 37)  # hidden states that fit into a 16-byte vector in every dtype
ONE_CHUNK = (72, 300)
TWO_CHUNKS = (40, 9001)  # of columns; on a CPU there are three
UNALIGNED = (37, 9001)  # the same chunks; rows are not whole vectors

SHARDS = (0, 23, 23, 130)  # one of them is empty


# ---- inputs ----------------------------------------------------------------------------------


def _labels(vocabulary: int, *shape: int) -> Tensor:
    """Random labels. Every fifth is masked; after a shift, each row still has a scored one."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels.view(-1)[::5] = IGNORE_INDEX
    return labels


def _packed_labels(vocabulary: int) -> Tensor:
    labels = _labels(vocabulary, PACKED)
    labels[CU_SEQLENS[:-1]] = IGNORE_INDEX  # like prompts
    return labels


def _logits(layout: Layout, labels: Tensor) -> dict[str, Any]:
    """The fields of a problem with logits."""
    shapes = {"logits": (*labels.shape, layout.vocabulary)}
    return {"shapes": shapes, "labels": labels, "layout": layout[1:]}


def _hidden(shape: tuple[int, int], labels: Tensor, has_bias: bool = False) -> dict[str, Any]:
    """The fields of a problem with hidden states; ``shape`` is (H, V)."""
    width, vocabulary = shape
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (*labels.shape, width),
        "weight": (vocabulary, width),
    }
    if has_bias:
        shapes["bias"] = (vocabulary,)
    return {"shapes": shapes, "labels": labels}


def _name(case: str, **options: Any) -> str:
    return ", ".join([case, *(f"{key} {value}" for key, value in options.items())])


# ---- both sides of a comparison --------------------------------------------------------------


def _call(function: Callable[..., Any], given: Given, **options: Any) -> Any:
    """Calls a function of this project."""
    inputs = dict(given.inputs)
    if "bias" in inputs:
        options["bias"] = inputs.pop("bias")
    return function(*inputs.values(), given.labels, **given.others, **options)


def _score(given: Given, **options: Any) -> Scored:
    """The same log-probabilities by the formula."""
    logits = given.inputs.get("logits")
    if logits is None:
        logits = rounded_logits(**given.inputs, dtype=given.dtype)
    return score(logits, given.labels, cu_seqlens=given.others.get("cu_seqlens"), **options)


def _token_logps(
    name: str,
    function: Callable[..., Tensor],
    fields: Mapping[str, Any],
    transform: Mapping[str, float],
    **options: Any,
) -> Problem:
    """Token log-probs; ``options`` are those of the function alone."""
    shift = options.get("shift", True)
    return Problem(
        name,
        ours=lambda given: {"logps": _call(function, given, **transform, **options)},
        truth=lambda given: {"logps": _score(given, shift=shift, **transform).logps},
        **fields,
    )


def _loss(
    name: str,
    function: Callable[..., simpo_ext.SimPOOutput],
    fields: Mapping[str, Any],
    loss: Mapping[str, Any],
    transform: Mapping[str, float],
    names: Sequence[str] = (),
) -> Problem:
    """All outputs of a loss, and a report with these names."""
    options = {"inplace_backward": True} if fields.get("inplace") else {}

    def ours(given: Given) -> Mapping[str, Tensor]:
        out = _call(function, given, report=names, **loss, **transform, **options)
        values = out._asdict()
        metrics = values.pop("metrics_values")
        first = metrics.numel() - 2 * len(names) - 3
        return {**values, "report": metrics[first : first + 2 * len(names)]}

    def truth(given: Given) -> Mapping[str, Tensor]:
        scored, pairs = _score(given, **transform), given.others.get("pairs", PAIRS)
        values = simpo(scored, pairs, weights=given.others.get("pair_weight"), **loss)
        return {**values, "report": reported(scored, pairs, names)} if names else values

    return Problem(name, ours=ours, truth=truth, **fields)


def _sequence_logps(name: str, fields: Mapping[str, Any], average: bool) -> Problem:
    return Problem(
        name,
        ours=lambda given: {
            "logps": _call(simpo_ext.sequence_logps, given, average_log_prob=average)
        },
        truth=lambda given: {"logps": _score(given).sequence_logps(average=average)},
        **fields,
    )


# ---- vocabulary shards -----------------------------------------------------------------------


def _in_shards(function: Callable[[VocabShard, slice], Tensor]) -> Tensor:
    """Calls the function with the shard and columns of each rank, all in one process.

    A rank's first call only stores what the rank gathers. The graph of every rank receives the
    whole upstream gradient, and autograd adds up the gradients of shared inputs, as an all-reduce
    would.
    """
    ranks = list(itertools.pairwise(SHARDS))
    gathered: dict[int, Tensor] = {}

    def on_rank(rank: int) -> Tensor:
        def gather(tensor: Tensor) -> Tensor:
            gathered[rank] = tensor
            return torch.stack([gathered.get(each, tensor) for each in range(len(ranks))])

        first, end = ranks[rank]
        return function(VocabShard(first, SHARDS[-1], gather, lambda sum: sum), slice(first, end))

    with torch.no_grad():
        for rank in range(len(ranks)):
            on_rank(rank)
    logps, *others = [on_rank(rank) for rank in range(len(ranks))]
    return logps + sum(other - other.detach() for other in others)


def _logits_in_shards(
    logits: Tensor, labels: Tensor, inplace_backward: bool, **transform: float
) -> Tensor:
    def of_shard(shard: VocabShard, columns: slice) -> Tensor:
        part = logits[..., columns]
        part = part.clone() if inplace_backward else part  # no rank overwrites another's logits
        return vocab_parallel_token_logps(
            part, labels, shard, inplace_backward=inplace_backward, **transform
        )

    return _in_shards(of_shard)


def _hidden_in_shards(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    def of_shard(shard: VocabShard, columns: slice) -> Tensor:
        part = None if bias is None else bias[columns]
        return vocab_parallel_linear_token_logps(hidden, weight[columns], labels, shard, bias=part)

    return _in_shards(of_shard)


# ---- all of them -----------------------------------------------------------------------------


def _problems() -> Iterator[Problem]:
    both = (False, True)
    labels = _labels(ODD.vocabulary, *SHAPE)
    odd = _logits(ODD, labels)
    packed = _packed_labels(ODD.vocabulary)
    function: Callable[..., Any]

    function = simpo_ext.token_logps
    for layout, (kind, transform), inplace in itertools.product(LAYOUTS, TRANSFORMS.items(), both):
        fields = {
            **_logits(layout, _labels(layout.vocabulary, *SHAPE)),
            "inplace": inplace,
            "for_sanitizer": layout in (LESS_THAN_A_VECTOR, ODD, SEVERAL_SEGMENTS),
        }
        name = _name("token_logps", V=layout.vocabulary, logits=kind, inplace=inplace)
        yield _token_logps(name, function, fields, transform, shift=False, inplace_backward=inplace)
    # The largest problem runs in one dtype, and not under a sanitizer.
    few = _labels(SEVERAL_SEGMENTS.vocabulary, *MANY)
    few.view(-1)[12:] = IGNORE_INDEX
    fields = {**_logits(SEVERAL_SEGMENTS, few), "dtypes": (torch.bfloat16,), "for_sanitizer": False}
    yield _token_logps("token_logps of many rows", function, fields, {}, shift=False)

    function = simpo_ext.simpo_loss
    for layout, (kind, transform), names in itertools.product(
        (ODD, SEVERAL_SEGMENTS), TRANSFORMS.items(), REPORTS
    ):
        fields = _logits(layout, _labels(layout.vocabulary, *SHAPE))
        fields["for_sanitizer"] = names == REPORTS[-1]
        name = _name("report", V=layout.vocabulary, logits=kind, of="+".join(names))
        yield _loss(name, function, fields, {}, transform, names)
    for (kind, loss), inplace in itertools.product(LOSSES.items(), both):
        fields = {**odd, "inplace": inplace, "for_sanitizer": not inplace}
        yield _loss(_name(f"loss {kind}", inplace=inplace), function, fields, loss, {})
    long = _labels(LESS_THAN_A_VECTOR.vocabulary, *LONG)
    fields = _logits(LESS_THAN_A_VECTOR, long)
    yield _loss("loss of long sequences", function, fields, {}, {})
    fields = {**_logits(ODD, packed), "others": WEIGHTED_PAIRS}
    yield _loss("packed pairs by index", function, fields, {}, {})

    for average, is_packed in itertools.product(both, both):
        others = {"cu_seqlens": NONE_EMPTY} if is_packed else {}
        fields = {**_logits(ODD, packed if is_packed else labels), "others": others}
        fields["for_sanitizer"] = average
        name = _name("sequence_logps", average=average, packed=is_packed)
        yield _sequence_logps(name, fields, average)

    function = _logits_in_shards
    for inplace, (kind, transform) in zip(both, TRANSFORMS.items(), strict=True):
        name = _name("logits in shards", logits=kind, inplace=inplace)
        yield _token_logps(name, function, odd, transform, inplace_backward=inplace)

    function = simpo_ext.linear_simpo_loss
    fields = {**_hidden((24, ODD.vocabulary), packed), "others": WEIGHTED_PAIRS}
    yield _loss("packed pairs by index, from hidden", function, fields, {}, {})
    fields = _hidden(ONE_CHUNK, _labels(ONE_CHUNK[1], *SHAPE))
    yield _loss("report from hidden", function, fields, {}, {}, REPORTS[-1])

    function = simpo_ext.linear_token_logps
    for size, has_bias, budget, kind, shape in (
        (SHORT_ROWS, False, RECOMPUTED, "plain", SHAPE),
        (SHORT_ROWS, True, KEPT, "plain", SHAPE),
        (ONE_CHUNK, False, KEPT, "scaled and capped", SHAPE),
        (ONE_CHUNK, True, RECOMPUTED, "plain", SHAPE),
        (TWO_CHUNKS, False, RECOMPUTED, "scaled and capped", SHAPE),
        (UNALIGNED, True, KEPT, "plain", SHAPE),
        (SHORT_ROWS, False, RECOMPUTED, "plain", LONG),
    ):
        fields = _hidden(size, _labels(size[1], *shape), has_bias)
        num_valid = int((fields["labels"][:, 1:] != IGNORE_INDEX).sum())
        options = {
            "logits_budget_bytes": budget,
            # The exact number, or one more: then a row has no token.
            "num_valid_tokens": num_valid + (not has_bias),
        }
        sizes = {"BxT": "x".join(map(str, shape)), "HxV": "x".join(map(str, size))}
        name = _name("from hidden", **sizes, bias=has_bias, logits=kind)
        name += f", chunks {'kept' if budget else 'recomputed'}"
        yield _token_logps(name, function, fields, TRANSFORMS[kind], **options)
    for has_bias in both:
        fields = _hidden((24, SHARDS[-1]), labels, has_bias)
        fields["for_sanitizer"] = has_bias
        yield _token_logps(_name("hidden in shards", bias=has_bias), _hidden_in_shards, fields, {})


def all_cases() -> list[Case]:
    """Every problem in every dtype."""
    return [Case(problem, dtype) for problem in _problems() for dtype in problem.dtypes]
