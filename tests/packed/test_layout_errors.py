"""Errors of wrong boundaries, pairs, weights and variants."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

import simpo_ext
from simpo_ext import (
    LinearSimPOLoss,
    SimPOLoss,
    count_pairs,
    linear_simpo_loss,
    linear_token_logps,
    sequence_logps,
    simpo_loss,
    simpo_loss_from_logps,
    simpo_loss_from_token_logps,
    token_logps,
)
from support.messages import message

pytestmark = pytest.mark.kernels

N, S, V, H = 9, 4, 7, 3
NAN, INF = float("nan"), float("inf")
INTS = "int64, int32, int16, int8, uint8"
LOGITS = torch.linspace(-1.0, 1.0, N * V).reshape(N, V)
HIDDEN = torch.linspace(-1.0, 1.0, N * H).reshape(N, H)
WEIGHT = torch.linspace(-1.0, 1.0, V * H).reshape(V, H)
LABELS = torch.arange(N) % V
CU = torch.tensor([0, 3, 5, 5, 8])
PAIRS = torch.tensor([[0, 1], [3, 1], [1, 3]])

# Functions of labels [N] or [1, N]. The logits or hidden states get the same shape.
Scorer: TypeAlias = Callable[..., object]
SCORERS: dict[str, Scorer] = {
    "token_logps": lambda y, **k: token_logps(LOGITS.view(*y.shape, V), y, **k),
    "sequence_logps": lambda y, **k: sequence_logps(LOGITS.view(*y.shape, V), y, **k),
    "linear_token_logps": lambda y, **k: linear_token_logps(
        HIDDEN.view(*y.shape, H), WEIGHT, y, **k
    ),
}
LOSSES: dict[str, Scorer] = {
    "simpo_loss": lambda y, **k: simpo_loss(LOGITS.view(*y.shape, V), y, **k),
    "SimPOLoss": lambda y, **k: SimPOLoss()(LOGITS.view(*y.shape, V), y, **k),
    "linear_simpo_loss": lambda y, **k: linear_simpo_loss(HIDDEN.view(*y.shape, H), WEIGHT, y, **k),
    "LinearSimPOLoss": lambda y, **k: LinearSimPOLoss()(HIDDEN.view(*y.shape, H), WEIGHT, y, **k),
    "simpo_loss_from_token_logps": lambda y, **k: simpo_loss_from_token_logps(
        -torch.ones(y.shape), y, **k
    ),
}
COUNT: dict[str, Scorer] = {"count_pairs": count_pairs}
# The tensor that a message about shapes names.
TOKENS = {"token_logps": "logits", "sequence_logps": "logits", "simpo_loss": "logits",
          "SimPOLoss": "logits", "simpo_loss_from_token_logps": "token_logps"}  # fmt: skip


def assert_names(error: pytest.ExceptionInfo[Exception], name: str, *parts: object) -> None:
    """The message begins with the argument and contains all parts. An int is a whole number."""
    text = str(error.value)
    assert text.startswith(name), text
    for part in parts:
        numbers = r"(?<![\d-]){}(?!\d)" if isinstance(part, int) else "{}"
        assert re.search(numbers.format(re.escape(str(part))), text), (part, text)


# ---- cu_seqlens ----------------------------------------------------------------------------------

BAD_BOUNDARIES: dict[str, tuple[Any, type[Exception], tuple[object, ...]]] = {
    "list": (CU.tolist(), TypeError, ("torch.Tensor", "list")),
    "array": (CU.numpy(), TypeError, ("torch.Tensor", "ndarray")),
    "float": (CU.float(), TypeError, ("int64", "int32", "torch.float32")),
    "int16": (CU.short(), TypeError, ("int64", "int32", "torch.int16")),
    "uint8": (CU.to(torch.uint8), TypeError, ("int64", "int32", "torch.uint8")),
    "bool": (CU > 0, TypeError, ("int64", "torch.bool")),
    "sparse": (CU.to_sparse(), TypeError, ("dense", "sparse")),
    "empty": (CU[:0], ValueError, ("[S + 1]", "[0]")),
    "scalar": (CU[0], ValueError, ("[S + 1]", "[]")),
    "2-d": (CU[None], ValueError, ("[S + 1]", "[1, 5]")),
}
EVERYTHING = {**SCORERS, **LOSSES, **COUNT}


@pytest.mark.parametrize("case", BAD_BOUNDARIES)
@pytest.mark.parametrize("scorer", EVERYTHING)
def test_invalid_boundaries(scorer: str, case: str) -> None:
    cu_seqlens, error, parts = BAD_BOUNDARIES[case]
    with pytest.raises(error, match=message("cu_seqlens: expected", *parts)):
        EVERYTHING[scorer](LABELS, cu_seqlens=cu_seqlens)


BAD_VALUES: dict[str, tuple[list[int], tuple[int, ...]]] = {
    # Boundaries, then the position and the values in the message.
    "decreasing": ([0, 5, 3, 8, 9], (2, 5, 3)),
    "decreasing at the end": ([0, 1, 2, 9, 8], (4, 9, 8)),
    "decreasing at the start": ([4, 3, 5, 5, 8], (1, 4, 3)),
    "the second of two": ([0, 2, 1, 0, 0], (2, 2, 1)),
    "below 0": ([-2, 3, 5, 5, 8], (0, -2)),
    "far below 0": ([-(2**31), 3, 5, 5, 8], (0, -(2**31))),
    "beyond N": ([0, 3, 5, 5, 10], (4, 10, N)),
    "far beyond N": ([0, 3, 5, 5, 2**31 - 1], (4, 2**31 - 1, N)),
    "all beyond N": ([20, 20, 20, 20, 20], (20, N)),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.parametrize("scorer", EVERYTHING)
def test_boundaries_that_do_not_divide_the_positions(
    scorer: str, case: str, dtype: torch.dtype
) -> None:
    boundaries, numbers = BAD_VALUES[case]
    for labels in (LABELS, LABELS[None]):
        with pytest.raises(ValueError, match=r"^cu_seqlens") as error:
            EVERYTHING[scorer](labels, cu_seqlens=torch.tensor(boundaries, dtype=dtype))
        assert_names(error, "cu_seqlens", *numbers)


@pytest.mark.cpu_only
def test_boundaries_beyond_every_index_are_refused() -> None:
    for value in (2**62, 2**63 - 1, -(2**63)):
        with pytest.raises(ValueError, match=message("cu_seqlens", value)):
            token_logps(LOGITS, LABELS, cu_seqlens=torch.tensor([0, value, 2, 2, 9]))


@pytest.mark.cpu_only
@pytest.mark.parametrize("scorer", {**LOSSES, **COUNT})
def test_boundaries_are_checked_even_if_no_pair_uses_them(scorer: str) -> None:
    pairs = torch.zeros(0, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^cu_seqlens"):
        EVERYTHING[scorer](LABELS, cu_seqlens=torch.tensor([0, 10]), pairs=pairs)


@pytest.mark.parametrize("shape", [(3, 3), (9, 1), (1, 1, 9)])
@pytest.mark.parametrize("scorer", EVERYTHING)
def test_boundaries_of_positions_in_rows(scorer: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=message(str(list(shape))[:-1])):
        EVERYTHING[scorer](LABELS.view(shape), cu_seqlens=CU)


@pytest.mark.parametrize("scorer", [*SCORERS, *LOSSES])
def test_flat_positions_without_boundaries(scorer: str) -> None:
    name = TOKENS.get(scorer, "hidden")
    with pytest.raises(ValueError, match=message(f"{name}: expected shape [B, T", f"[{N}")):
        EVERYTHING[scorer](LABELS)


def test_labels_with_another_number_of_positions() -> None:
    for logits, labels in ((LOGITS, LABELS[1:]), (LOGITS[None], LABELS[None, 1:])):
        with pytest.raises(ValueError, match=message("labels", "expected", f"{N - 1}]")):
            token_logps(logits, labels, cu_seqlens=CU)
    with pytest.raises(ValueError, match=message("labels", "expected", f"{N - 1}]")):
        linear_token_logps(HIDDEN, WEIGHT, LABELS[1:], cu_seqlens=CU)
    with pytest.raises(ValueError, match=message("labels", "expected", f"{N - 1}]")):
        simpo_loss_from_token_logps(LOGITS[:, 0], LABELS[1:], cu_seqlens=CU)
    for logits, labels in ((LOGITS[None], LABELS), (LOGITS, LABELS[None])):
        with pytest.raises(ValueError, match=message("labels", "expected")):
            token_logps(logits, labels, cu_seqlens=CU)


@pytest.mark.parametrize("scorer", LOSSES)
def test_an_odd_number_of_sequences_without_pairs(scorer: str) -> None:
    with pytest.raises(ValueError, match=message("cu_seqlens: expected", "even", "pairs", "3")):
        LOSSES[scorer](LABELS, cu_seqlens=CU[:4])
    rows = LABELS.view(3, 3)
    with pytest.raises(ValueError, match=message("expected an even B", "pairs", "3")):
        LOSSES[scorer](rows)
    LOSSES[scorer](rows, pairs=torch.tensor([[0, 2]]))


def test_count_pairs_refuses_an_odd_number_of_sequences() -> None:
    with pytest.raises(ValueError, match=message("cu_seqlens: expected", "even", "3")):
        count_pairs(LABELS, cu_seqlens=CU[:4])
    with pytest.raises(ValueError, match=message("labels: expected an even B", "3")):
        count_pairs(LABELS.view(3, 3))


def test_tensors_on_other_devices() -> None:
    for name, value in (("cu_seqlens", CU), ("pairs", PAIRS), ("pair_weight", torch.ones(3))):
        options = {"cu_seqlens": CU, "pairs": PAIRS, name: value.to("meta")}
        with pytest.raises(ValueError, match=message(f"{name}: expected device cpu", "meta")):
            simpo_loss(LOGITS, LABELS, **options)


# ---- pairs ---------------------------------------------------------------------------------------

PAIRED = {**LOSSES, **COUNT}
BAD_PAIRS: dict[str, tuple[Any, type[Exception], tuple[object, ...]]] = {
    "list": (PAIRS.tolist(), TypeError, ("torch.Tensor", "list")),
    "array": (PAIRS.numpy(), TypeError, ("torch.Tensor", "ndarray")),
    "float": (PAIRS.double(), TypeError, (INTS, "torch.float64")),
    "bool": (PAIRS > 0, TypeError, (INTS, "torch.bool")),
    "sparse": (PAIRS.to_sparse(), TypeError, ("dense", "sparse")),
    "1-d": (PAIRS[0], ValueError, ("[P, 2]", "[2]")),
    "3-d": (PAIRS[None], ValueError, ("[P, 2]", "[1, 3, 2]")),
    "transposed": (PAIRS.t(), ValueError, ("[P, 2]", "[2, 3]")),
    "empty": (PAIRS.flatten()[:0], ValueError, ("[P, 2]", "[0]")),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
@pytest.mark.parametrize("scorer", PAIRED)
def test_invalid_pairs(scorer: str, case: str) -> None:
    pairs, error, parts = BAD_PAIRS[case]
    with pytest.raises(error, match=message("pairs: expected", *parts)):
        PAIRED[scorer](LABELS, cu_seqlens=CU, pairs=pairs)


@pytest.mark.cpu_only
@pytest.mark.parametrize("index", [S, 17, -1, -S, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("scorer", PAIRED)
def test_the_error_names_a_missing_sequence(scorer: str, side: int, index: int) -> None:
    pairs = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 2], [0, 3]])
    pairs[3, side] = index
    pairs[4, 0] = 99  # Comes later, so it is not reported.
    what = f"pairs[3, {side}] is out of range: expected a sequence in [0, {S}), got {index}"
    for labels, layout in ((LABELS, {"cu_seqlens": CU}), (LABELS[:8].view(4, 2), {})):
        if scorer in ("count_pairs", "simpo_loss_from_token_logps") or layout:
            with pytest.raises(IndexError, match=re.escape(what)):
                PAIRED[scorer](labels, pairs=pairs, **layout)


@pytest.mark.cpu_only
def test_the_error_names_a_missing_row() -> None:
    logits, labels = LOGITS.view(3, 3, V), LABELS.view(3, 3)
    for index in (3, -1):
        pairs = torch.tensor([[0, 1], [2, index]], dtype=torch.int32)
        with pytest.raises(IndexError, match=message("pairs[1, 1]", "[0, 3)", f"got {index}")):
            simpo_loss(logits, labels, pairs=pairs)
        with pytest.raises(IndexError, match=message("pairs[1, 1]", "[0, 3)", f"got {index}")):
            count_pairs(labels, pairs=pairs)


@pytest.mark.cpu_only
def test_a_pair_without_sequences() -> None:
    for cu in (CU[:1], CU[-1:]):
        with pytest.raises(IndexError, match=message("pairs[0, 0]", "[0, 0)", "got 0")):
            simpo_loss(LOGITS, LABELS, cu_seqlens=cu, pairs=torch.tensor([[0, 0]]))


# ---- pair_weight ---------------------------------------------------------------------------------

BAD_WEIGHTS: dict[str, tuple[Any, type[Exception], tuple[object, ...]]] = {
    "list": ([1.0, 1.0, 1.0], TypeError, ("torch.Tensor", "list")),
    "number": (1.0, TypeError, ("torch.Tensor", "float")),
    "array": (np.ones(3), TypeError, ("torch.Tensor", "ndarray")),
    "complex": (torch.ones(3).cfloat(), TypeError, ("torch.complex64",)),
    "sparse": (torch.ones(3).to_sparse(), TypeError, ("dense", "sparse")),
    "requires grad": (torch.ones(3, requires_grad=True), ValueError, ("requires grad",)),
    "computed": (2 * torch.ones(3, requires_grad=True), ValueError, ("requires grad",)),
    "scalar": (torch.tensor(1.0), ValueError, ("[3]", "[]")),
    "one": (torch.ones(1), ValueError, ("[3]", "[1]")),
    "of sequences": (torch.ones(S), ValueError, ("[3]", f"[{S}]")),
    "2-d": (torch.ones(3, 1), ValueError, ("[3]", "[3, 1]")),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
@pytest.mark.parametrize("scorer", LOSSES)
def test_invalid_weights(scorer: str, case: str) -> None:
    weight, error, parts = BAD_WEIGHTS[case]
    with pytest.raises(error, match=message("pair_weight: expected", *parts)):
        LOSSES[scorer](LABELS, cu_seqlens=CU, pairs=PAIRS, pair_weight=weight)


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_invalid_weights_of_sequence_logps(case: str) -> None:
    weight, error, parts = BAD_WEIGHTS[case]
    with pytest.raises(error, match=message("pair_weight: expected", *parts)):
        simpo_loss_from_logps(-torch.ones(3), -torch.ones(3), pair_weight=weight)


def test_weights_that_require_grad_are_refused_under_no_grad() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message("pair_weight", "requires grad")):
        simpo_loss(LOGITS.view(9, 1, V), LABELS.view(9, 1), pairs=PAIRS,
                   pair_weight=torch.ones(3, requires_grad=True))  # fmt: skip


# ---- variants ------------------------------------------------------------------------------------

WITH_OPTIONS: dict[str, Callable[..., object]] = {
    **{name: lambda score=score, **k: score(LABELS, cu_seqlens=CU, **k)
       for name, score in LOSSES.items() if "SimPOLoss" not in name},
    "SimPOLoss": SimPOLoss,
    "LinearSimPOLoss": LinearSimPOLoss,
    "simpo_loss_from_logps": lambda **k: simpo_loss_from_logps(
        -torch.ones(3), -torch.ones(3), **k
    ),
}  # fmt: skip
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], tuple[object, ...]]] = [
    *(({"alpha": x}, ValueError, ("alpha: expected", x)) for x in (9e-31, -9e-31, 1.1e30, -1e31)),
    *(({"alpha": x}, ValueError, ("alpha: expected", x)) for x in (NAN, INF, -INF, 1e-320)),
    *(({"alpha": x}, TypeError, ("alpha: expected a number", type(x).__name__))
      for x in (True, "0.1", [0.1], 1j, None, torch.tensor(0.1))),
    ({"loss_type": "ipo", "label_smoothing": 0.1}, ValueError,
     ("label_smoothing: expected 0", "ipo", 0.1)),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError,
     ("label_smoothing: expected 0", "hinge", 0.1)),
    *(({"loss_type": x}, ValueError, ("loss_type: expected one of", "'ipo'", repr(x)))
      for x in ("IPO", "dpo", "ipo ", "")),
    ({"loss_type": "ipo", "gamma": 1.0, "gamma_beta_ratio": 0.5}, ValueError,
     ("gamma", "at most one", 1.0, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("function", WITH_OPTIONS)
def test_invalid_options(function: str, case: Any) -> None:
    options, error, parts = case
    with pytest.raises(error, match=message(*parts)):
        WITH_OPTIONS[function](**options)


@pytest.mark.parametrize("alpha", [1e-30, -1e-30, 1e30, -1e30, 0, -0.0, 1, np.float32(0.5)])
@pytest.mark.parametrize("function", WITH_OPTIONS)
def test_valid_alphas(function: str, alpha: Any) -> None:
    WITH_OPTIONS[function](alpha=alpha)


# ---- token log-probabilities, counts and modules -------------------------------------------------

LOGPS = -torch.ones(4, 2)
ROWS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(("logps", "labels", "error", "parts"), [
    (LOGPS.tolist(), ROWS, TypeError, ("token_logps: expected", "torch.Tensor", "list")),
    (LOGPS.long(), ROWS, TypeError, ("token_logps: expected", "float32", "torch.int64")),
    (LOGPS.cfloat(), ROWS, TypeError, ("token_logps: expected", "float32", "torch.complex64")),
    (LOGPS, ROWS.float(), TypeError, ("labels: expected", INTS, "torch.float32")),
    (LOGPS, ROWS[:, 1:], ValueError, ("labels: expected shape [4, 2]", "[4, 1]")),
    (LOGPS[0], ROWS[0], ValueError, ("token_logps: expected shape [B, T]", "[2]")),
    (LOGPS[..., None], ROWS, ValueError, ("token_logps: expected shape [B, T]", "[4, 2, 1]")),
    (LOGPS[:3], ROWS[:3], ValueError, ("token_logps: expected an even B", "3")),
    (LOGPS, ROWS.to("meta"), ValueError, ("labels: expected device cpu", "meta")),
])  # fmt: skip
def test_invalid_token_logps(logps: Any, labels: Any, error: Any, parts: Any) -> None:
    with pytest.raises(error, match=message(*parts)):
        simpo_loss_from_token_logps(logps, labels)


@pytest.mark.parametrize(("labels", "options", "error", "parts"), [
    (ROWS.tolist(), {}, TypeError, ("labels: expected", "torch.Tensor", "list")),
    (ROWS.float(), {}, TypeError, ("labels: expected", INTS, "torch.float32")),
    (ROWS[0], {}, ValueError, ("labels: expected shape [B, T]", "[2]")),
    (ROWS[None], {}, ValueError, ("labels: expected shape [B, T]", "[1, 4, 2]")),
    (ROWS, {"empty": "keep"}, ValueError, ("empty: expected one of 'drop'", "'keep'")),
    (ROWS, {"empty": True}, TypeError, ("empty: expected one of 'drop'", "bool")),
    (ROWS, {"shift": 1}, TypeError, ("shift: expected a bool", "int")),
    (ROWS, {"ignore_index": -100.0}, TypeError, ("ignore_index: expected an int", "float")),
    (ROWS, {"ignore_index": 2**63}, ValueError, ("ignore_index", "64-bit")),
])  # fmt: skip
def test_count_pairs_checks_arguments(labels: Any, options: Any, error: Any, parts: Any) -> None:
    with pytest.raises(error, match=message(*parts)):
        count_pairs(labels, **options)


@pytest.mark.parametrize("name", ["cu_seqlens", "pairs", "pair_weight"])
@pytest.mark.parametrize("module", [SimPOLoss, LinearSimPOLoss])
def test_modules_refuse_arguments_of_a_batch(module: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        module(**{name: torch.ones(3)})


def test_functions_of_sequences_take_no_pairs() -> None:
    calls = ((token_logps, 1), (sequence_logps, 1), (linear_token_logps, 2))
    for function, tensors in calls:
        with pytest.raises(TypeError, match="pairs"):
            function(*[LOGITS] * tensors, LABELS, pairs=PAIRS)
    assert simpo_ext.simpo_loss is simpo_loss


# ---- in place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda x: x,  # a leaf
    lambda x: x[None],
    lambda x: (2 * x)[:1].expand(N, V),
    lambda x: (2 * x).t().contiguous().t(),
    lambda x: (2 * x).flatten().as_strided((N, V), (V - 1, 1)),
], ids=["leaf", "view of a leaf", "expanded", "transposed", "overlapping"])  # fmt: skip
def test_packed_logits_that_cannot_be_overwritten(make: Callable[[Tensor], Tensor]) -> None:
    logits = make(LOGITS.clone().requires_grad_())
    labels = LABELS[None] if logits.dim() == 3 else LABELS
    for function in (simpo_loss, token_logps, sequence_logps):
        with pytest.raises(ValueError, match=r"^inplace_backward: expected"):
            function(logits, labels, cu_seqlens=CU, inplace_backward=True)
