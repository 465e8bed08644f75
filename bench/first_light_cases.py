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
from bench.first_light_checks import FROM_HIDDEN, FROM_LOGITS, Case, Problem
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

SHAPE = BATCH, TIME = 4, 3
LONG = 4, 1100  # more tokens than a block takes in one iteration of its loop
MANY = 4, 208  # so many rows that blocks do not share them
PAIRS = torch.tensor([[0, 2], [1, 3]])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """How the rows of logits lie in their allocation, in elements."""

    vocabulary: int
    offset: int
    padding: int  # between rows


LESS_THAN_A_VECTOR = Layout(7, 3, 0)
ODD = Layout(130, 1, 1)  # every row has a head and a tail, and alignments take turns
LARGE = Layout(20003, 1, 2)  # rows for the kernels for large rows
SEVERAL_SEGMENTS = Layout(40007, 3, 1)  # rows of 64 KiB and more, which several blocks share
LAYOUTS = (
    Layout(1, 1, 0),
    LESS_THAN_A_VECTOR,
    ODD,
    Layout(1000, 0, 0),  # whole vectors, all aligned
    Layout(4099, 5, 0),  # small rows that take more than one pass
    LARGE,
    SEVERAL_SEGMENTS,
)
TRANSFORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled and capped": {"logit_scale": 0.7, "softcap": 5.0},
}


# ---- inputs ----------------------------------------------------------------------------------


def _random(*shape: int, dtype: torch.dtype, seed: int = 0, std: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
    return values.to(dtype).double()


def _labels(vocabulary: int, *shape: int) -> Tensor:
    """Random labels. Every fifth is masked; after a shift, each row still has a scored one."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels.view(-1)[::5] = IGNORE_INDEX
    return labels


def _names(case: str, **options: Any) -> str:
    return ", ".join([case, *(f"{key} {value}" for key, value in options.items())])


# ---- from logits -----------------------------------------------------------------------------


def _token_logps(
    layout: Layout,
    transform: dict[str, float],
    inplace: bool,
    shape: tuple[int, int] = SHAPE,
    num_scored: int | None = None,
) -> Any:
    """Token log-probs. If ``num_scored`` is given, only so many positions are scored."""

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _labels(layout.vocabulary, *shape)
        if num_scored is not None:
            labels.view(-1)[num_scored:] = IGNORE_INDEX
        return Problem(
            {"logits": _random(*shape, layout.vocabulary, dtype=dtype)},
            lambda logits: {
                "logps": simpo_ext.token_logps(
                    logits, labels.to(device), shift=False, inplace_backward=inplace, **transform
                )
            },
            lambda logits: {"logps": score(logits, labels, shift=False, **transform).logps},
            FROM_LOGITS,
            layout[1:],
            inplace,
        )

    return make


def _reports(layout: Layout, transform: dict[str, float], names: Sequence[str]) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _labels(layout.vocabulary, BATCH, TIME)

        def ours(logits: Tensor) -> Mapping[str, Tensor]:
            out = simpo_ext.simpo_loss(logits, labels.to(device), report=names, **transform)
            first = out.metrics_values.numel() - 2 * len(names) - 3
            return {"loss": out.loss, "report": out.metrics_values[first : first + 2 * len(names)]}

        def truth(logits: Tensor) -> Mapping[str, Tensor]:
            scored = score(logits, labels, **transform)
            of_sides = reported(scored, PAIRS, names)
            return {"loss": simpo(scored, PAIRS)["loss"], "report": of_sides}

        inputs = {"logits": _random(BATCH, TIME, layout.vocabulary, dtype=dtype)}
        return Problem(inputs, ours, truth, FROM_LOGITS, layout[1:])

    return make


def _outputs(out: simpo_ext.SimPOOutput) -> Mapping[str, Tensor]:
    return {name: value for name, value in out._asdict().items() if name != "metrics_values"}


def _losses(
    loss: dict[str, Any], inplace: bool, layout: Layout = ODD, shape: tuple[int, int] = SHAPE
) -> Any:
    """The loss from logits of B sequences of T positions."""

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _labels(layout.vocabulary, *shape)
        options = dict(loss)
        margin = options.pop("gamma_beta_ratio", 0.5)
        return Problem(
            {"logits": _random(*shape, layout.vocabulary, dtype=dtype)},
            lambda logits: _outputs(
                simpo_ext.simpo_loss(logits, labels.to(device), inplace_backward=inplace, **loss)
            ),
            lambda logits: simpo(score(logits, labels), PAIRS, margin=margin, **options),
            FROM_LOGITS,
            layout[1:],
            inplace,
        )

    return make


LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1, "sft_weight": 0.3},
    "hinge": {"loss_type": "hinge", "gamma_beta_ratio": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.5, "gamma_beta_ratio": 0.0},
    "AlphaPO": {"alpha": 0.25, "beta": 2.5, "gamma_beta_ratio": 0.2},
}

# Packed sequences: one is empty, and one has a single token, which predicts nothing. The first and
# the last positions belong to no sequence.
CU_SEQLENS = torch.tensor([1, 4, 4, 9, 10, 15, 18])
PACKED = 20
# Sequences are in several pairs, as chosen and as rejected. The last pair has weight 0.
PACKED_PAIRS = torch.tensor([[0, 2], [0, 4], [4, 5], [2, 5]])
PACKED_WEIGHTS = torch.tensor([1.5, 0.25, 1.0, 0.0], dtype=torch.float64)


def _packed_labels(vocabulary: int) -> Tensor:
    labels = _labels(vocabulary, PACKED)
    labels[CU_SEQLENS[:-1]] = IGNORE_INDEX  # like prompts
    return labels


def _packed(vocabulary: int, from_hidden: bool) -> Any:
    """The loss of weighted pairs given by indices, from packed logits or hidden states."""

    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _packed_labels(vocabulary)
        layout = {
            "cu_seqlens": CU_SEQLENS.to(device),
            "pairs": PACKED_PAIRS.to(device),
            "pair_weight": PACKED_WEIGHTS.to(device),
        }

        def loss_of(logits: Tensor) -> Mapping[str, Tensor]:
            scored = score(logits, labels, cu_seqlens=CU_SEQLENS)
            return simpo(scored, PACKED_PAIRS, weights=PACKED_WEIGHTS)

        if not from_hidden:
            return Problem(
                {"logits": _random(PACKED, vocabulary, dtype=dtype)},
                lambda logits: _outputs(simpo_ext.simpo_loss(logits, labels.to(device), **layout)),
                loss_of,
                FROM_LOGITS,
                ODD[1:],
            )
        hidden = _random(PACKED, 24, dtype=dtype, std=1.0)
        weight = _random(vocabulary, 24, dtype=dtype, seed=1, std=0.5)
        return Problem(
            {"hidden": hidden, "weight": weight},
            lambda hidden, weight: _outputs(
                simpo_ext.linear_simpo_loss(hidden, weight, labels.to(device), **layout)
            ),
            lambda hidden, weight: loss_of(rounded_logits(hidden, weight, None, dtype)),
            FROM_HIDDEN,
        )

    return make


def _sequences(average: bool, is_packed: bool) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        # No sequence is empty: its log-probability would be NaN.
        edges = torch.tensor([1, 4, 9, 15, 18]) if is_packed else None
        labels = _packed_labels(ODD.vocabulary) if is_packed else _labels(ODD.vocabulary, 4, 3)
        return Problem(
            {"logits": _random(*labels.shape, ODD.vocabulary, dtype=dtype)},
            lambda logits: {
                "logps": simpo_ext.sequence_logps(
                    logits,
                    labels.to(device),
                    average_log_prob=average,
                    cu_seqlens=None if edges is None else edges.to(device),
                )
            },
            lambda logits: {
                "logps": score(logits, labels, cu_seqlens=edges).sequence_logps(average=average)
            },
            FROM_LOGITS,
            ODD[1:],
        )

    return make


# ---- vocabulary shards -----------------------------------------------------------------------

SHARDS = (0, 23, 23, 130)  # one of them is empty


def _in_shards(
    function: Callable[[VocabShard, slice], Tensor],
) -> Mapping[str, Tensor]:
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
    return {"logps": logps + sum(other - other.detach() for other in others)}


def _logits_in_shards(inplace: bool, transform: dict[str, float]) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _labels(SHARDS[-1], BATCH, TIME)

        def ours(logits: Tensor) -> Mapping[str, Tensor]:
            def of_shard(shard: VocabShard, columns: slice) -> Tensor:
                part = logits[..., columns]
                return vocab_parallel_token_logps(
                    part.clone() if inplace else part,  # no rank overwrites another's logits
                    labels.to(device),
                    shard,
                    inplace_backward=inplace,
                    **transform,
                )

            return _in_shards(of_shard)

        return Problem(
            {"logits": _random(BATCH, TIME, SHARDS[-1], dtype=dtype)},
            ours,
            lambda logits: {"logps": score(logits, labels, **transform).logps},
            FROM_LOGITS,
            ODD[1:],
        )

    return make


def _hidden_in_shards(has_bias: bool) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _labels(SHARDS[-1], BATCH, TIME)

        def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            return _in_shards(
                lambda shard, columns: vocab_parallel_linear_token_logps(
                    hidden,
                    weight[columns],
                    labels.to(device),
                    shard,
                    bias=None if bias is None else bias[columns],
                )
            )

        def truth_of(logits: Tensor) -> Mapping[str, Tensor]:
            return {"logps": score(logits, labels).logps}

        return _from_hidden(dtype, (24, SHARDS[-1]), has_bias, ours, truth_of)

    return make


# ---- from hidden states ----------------------------------------------------------------------


def _from_hidden(
    dtype: torch.dtype,
    shape: tuple[int, int],
    has_bias: bool,
    ours: Callable[..., Mapping[str, Tensor]],
    truth_of: Callable[[Tensor], Mapping[str, Tensor]],
    tokens: tuple[int, int] = SHAPE,
) -> Problem:
    width, vocabulary = shape
    inputs = {
        "hidden": _random(*tokens, width, dtype=dtype, std=1.0),
        "weight": _random(vocabulary, width, dtype=dtype, seed=1, std=2.0 * width**-0.5),
    }
    if has_bias:
        inputs["bias"] = _random(vocabulary, dtype=dtype, seed=3, std=1.0)

    def truth(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Mapping[str, Tensor]:
        return truth_of(rounded_logits(hidden, weight, bias, dtype))

    return Problem(inputs, ours, truth, FROM_HIDDEN)


def _linear(
    shape: tuple[int, int],
    has_bias: bool,
    budget: int,
    transform: dict[str, float],
    tokens: tuple[int, int] = SHAPE,
) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> Problem:
        labels = _labels(shape[1], *tokens)
        is_valid = score(torch.zeros(*tokens, shape[1]), labels).is_valid
        # The exact count, or one more: then a row has no token.
        bound = int(is_valid.sum()) + (not has_bias)

        def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            return {
                "logps": simpo_ext.linear_token_logps(
                    hidden,
                    weight,
                    labels.to(device),
                    bias=bias,
                    logits_budget_bytes=budget,
                    num_valid_tokens=bound,
                    **transform,
                )
            }

        def truth_of(logits: Tensor) -> Mapping[str, Tensor]:
            return {"logps": score(logits, labels, **transform).logps}

        return _from_hidden(dtype, shape, has_bias, ours, truth_of, tokens)

    return make


def _linear_report(dtype: torch.dtype, device: torch.device) -> Problem:
    labels = _labels(300, BATCH, TIME)
    names = ("logits", "logits_all", "entropy")

    def ours(hidden: Tensor, weight: Tensor) -> Mapping[str, Tensor]:
        out = simpo_ext.linear_simpo_loss(hidden, weight, labels.to(device), report=names)
        first = out.metrics_values.numel() - 2 * len(names) - 3
        return {"loss": out.loss, "report": out.metrics_values[first : first + 2 * len(names)]}

    def truth_of(logits: Tensor) -> Mapping[str, Tensor]:
        scored: Scored = score(logits, labels)
        return {"loss": simpo(scored, PAIRS)["loss"], "report": reported(scored, PAIRS, names)}

    return _from_hidden(dtype, (72, 300), False, ours, truth_of)


# ---- all of them -----------------------------------------------------------------------------

RECOMPUTED, KEPT = 0, 2**30
SHORT_ROWS = (2, 37)  # hidden states that fit into a 16-byte vector in every dtype
ONE_CHUNK = (72, 300)
TWO_CHUNKS = (40, 9001)  # of columns; on a CPU there are three
UNALIGNED = (37, 9001)  # the same chunks; rows are not whole vectors


def _makers() -> Iterator[tuple[str, Any, bool]]:
    """Name, problem, and whether the sanitizer's selection includes it."""
    both = (False, True)
    for layout, (name, transform), inplace in itertools.product(LAYOUTS, TRANSFORMS.items(), both):
        title = _names("token_logps", V=layout.vocabulary, logits=name, inplace=inplace)
        is_odd = layout in (LESS_THAN_A_VECTOR, ODD, SEVERAL_SEGMENTS)
        yield title, _token_logps(layout, transform, inplace), is_odd
    reported_layouts = (ODD, SEVERAL_SEGMENTS)
    for layout, (name, transform) in itertools.product(reported_layouts, TRANSFORMS.items()):
        for names in (("logits", "entropy"), ("logits", "logits_all", "entropy")):
            title = _names("report", V=layout.vocabulary, logits=name, of="+".join(names))
            yield title, _reports(layout, transform, names), len(names) == 3
    for (name, loss), inplace in itertools.product(LOSSES.items(), both):
        yield _names(f"loss {name}", inplace=inplace), _losses(loss, inplace), not inplace
    yield "loss of long sequences", _losses({}, False, LESS_THAN_A_VECTOR, LONG), True
    yield "packed pairs by index", _packed(ODD.vocabulary, from_hidden=False), True
    yield "packed pairs by index, from hidden", _packed(ODD.vocabulary, from_hidden=True), True
    for average, is_packed in itertools.product(both, both):
        title = _names("sequence_logps", average=average, packed=is_packed)
        yield title, _sequences(average, is_packed), average
    for inplace, (name, transform) in zip(both, TRANSFORMS.items(), strict=True):
        title = _names("logits in shards", logits=name, inplace=inplace)
        yield title, _logits_in_shards(inplace, transform), True
    for shape, has_bias, budget, name in (
        (SHORT_ROWS, False, RECOMPUTED, "plain"),
        (SHORT_ROWS, True, KEPT, "plain"),
        (ONE_CHUNK, False, KEPT, "scaled and capped"),
        (ONE_CHUNK, True, RECOMPUTED, "plain"),
        (TWO_CHUNKS, False, RECOMPUTED, "scaled and capped"),
        (UNALIGNED, True, KEPT, "plain"),
    ):
        kept = "kept" if budget else "recomputed"
        title = _names("from hidden", HxV="x".join(map(str, shape)), bias=has_bias, logits=name)
        make = _linear(shape, has_bias, budget, TRANSFORMS[name])
        yield f"{title}, chunks {kept}", make, True
    long = _linear(SHORT_ROWS, False, RECOMPUTED, {}, LONG)
    yield "from hidden of long sequences", long, True
    yield "report from hidden", _linear_report, True
    for has_bias in both:
        yield _names("hidden in shards", bias=has_bias), _hidden_in_shards(has_bias), has_bias


def all_cases() -> list[Case]:
    """Every problem in every dtype."""
    cases = [
        Case(name, dtype, make, for_sanitizer)
        for name, make, for_sanitizer in _makers()
        for dtype in DTYPES
    ]
    # The largest case runs in one dtype, and not under a sanitizer.
    many = _token_logps(SEVERAL_SEGMENTS, {}, False, MANY, num_scored=12)
    return [*cases, Case("token_logps of many rows", torch.bfloat16, many, for_sanitizer=False)]
