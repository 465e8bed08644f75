"""Errors of wrong arguments: their class, and a message with argument, expectation and value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from simpo_ext import (
    SimPOLoss,
    sequence_logps,
    simpo_loss,
    simpo_loss_from_logps,
    token_logps,
)
from support.messages import message

pytestmark = pytest.mark.kernels

P, T, V = 2, 5, 7
B = 2 * P
NAN, INF = float("nan"), float("inf")
FLOATS = "float64, float32, bfloat16, float16"
INTS = "int64, int32, int16, int8, uint8"


def _logits() -> Tensor:
    return torch.linspace(-1.0, 1.0, B * T * V).reshape(B, T, V).clone()


def _labels() -> Tensor:
    return torch.arange(B * T).reshape(B, T) % V


def _logps() -> Tensor:
    return torch.linspace(-2.0, -1.0, P)


def _nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(T, V), torch.zeros(2, V)], layout=layout)


SCORERS: dict[str, Callable[..., Any]] = {
    "token_logps": token_logps,
    "sequence_logps": sequence_logps,
    "simpo_loss": simpo_loss,
    "SimPOLoss": SimPOLoss(),
}

# ---- logits and labels ---------------------------------------------------------------------------

Case: TypeAlias = tuple[Callable[[], object], type[Exception], tuple[str, ...]]
BAD_LOGITS: dict[str, Case] = {
    "none": (lambda: None, TypeError, ("torch.Tensor", "NoneType")),
    "integer": (lambda: _logits().long(), TypeError, (FLOATS, "torch.int64")),
    "bool": (lambda: _logits() > 0, TypeError, (FLOATS, "torch.bool")),
    "complex": (lambda: _logits().cfloat(), TypeError, (FLOATS, "torch.complex64")),
    "sparse": (lambda: _logits().to_sparse(), TypeError, ("dense", "torch.sparse_coo")),
    "nested": (lambda: _nested(torch.strided), TypeError, ("dense", "nested")),
    "jagged": (lambda: _nested(torch.jagged), TypeError, ("dense", "nested")),
    "2-d": (lambda: _logits()[0], ValueError, ("[B, T, V]", f"[{T}, {V}]")),
    "4-d": (lambda: _logits()[None], ValueError, ("[B, T, V]", f"[1, {B}, {T}, {V}]")),
}
BAD_LABELS: dict[str, Case] = {
    "list": (lambda: _labels().tolist(), TypeError, ("torch.Tensor", "list")),
    "float": (lambda: _labels().float(), TypeError, ("integer", "torch.float32")),
    "requires grad": (lambda: _labels().double().requires_grad_(), TypeError, ("integer", "64")),
    "bool": (lambda: _labels() > 2, TypeError, ("integer", "torch.bool")),
    "complex": (lambda: _labels().cfloat(), TypeError, ("integer", "torch.complex64")),
    # uint16 is an integer, so the message must list the dtypes.
    "uint16": (lambda: _labels().to(torch.uint16), TypeError, (INTS, "torch.uint16")),
    "sparse": (lambda: _labels().to_sparse(), TypeError, ("dense", "torch.sparse_coo")),
    "1-d": (lambda: _labels()[0], ValueError, (f"[{B}, {T}]", f"[{T}]")),
    "other T": (lambda: _labels()[:, 1:], ValueError, (f"[{B}, {T}]", f"[{B}, {T - 1}]")),
    "broadcastable": (lambda: _labels()[:1], ValueError, (f"[{B}, {T}]", f"[1, {T}]")),
    "other device": (lambda: _labels().to("meta"), ValueError, ("device cpu", "meta")),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", BAD_LOGITS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_invalid_logits(scorer: str, case: str) -> None:
    make, error, parts = BAD_LOGITS[case]
    with pytest.raises(error, match=message("logits: expected", *parts)):
        SCORERS[scorer](make(), _labels())


@pytest.mark.parametrize("case", BAD_LABELS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_invalid_labels(scorer: str, case: str) -> None:
    make, error, parts = BAD_LABELS[case]
    with pytest.raises(error, match=message("labels: expected", *parts)):
        SCORERS[scorer](_logits(), make())


@pytest.mark.parametrize("scorer", ["simpo_loss", "SimPOLoss"])
def test_an_odd_batch_cannot_be_split_into_pairs(scorer: str) -> None:
    with pytest.raises(ValueError, match=message("logits: expected", "even B", "got 3")):
        SCORERS[scorer](_logits()[:3], _labels()[:3])


# ---- labels out of range: errors on CPUs (CUDA: tests/cuda/test_kernels.py) ----------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("label", [-1, -99, -101, V, V + 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("scorer", ["token_logps", "sequence_logps", "simpo_loss"])
def test_the_error_names_a_label_out_of_range(scorer: str, label: int, shift: bool) -> None:
    labels = _labels()
    labels[2, 3] = label
    labels[3, 1] = V  # Comes later in memory, so it is not reported.
    with pytest.raises(IndexError, match=message("labels[2, 3]", "-100", f"[0, {V})", label)):
        SCORERS[scorer](_logits(), labels, shift=shift)


@pytest.mark.cpu_only
def test_only_scored_labels_must_be_in_range() -> None:
    labels = _labels()
    labels[1, 0] = 99  # The shift does not score the first column.
    assert torch.equal(token_logps(_logits(), labels), token_logps(_logits(), _labels()))
    with pytest.raises(IndexError, match=message("labels[1, 0]", "got 99")):
        token_logps(_logits(), labels, shift=False)


# ---- options -------------------------------------------------------------------------------------

FUNCTIONS = (token_logps, sequence_logps, simpo_loss, simpo_loss_from_logps, SimPOLoss)
TOKEN_SFT = {"sft_weight": 0.1, "sft_reduction": "token"}
# Keywords, the error, and parts of its message.
OptionCase: TypeAlias = tuple[dict[str, Any], type[Exception], tuple[object, ...]]


def _bad_types(name: str, expected: str, *values: object) -> list[OptionCase]:
    return [({name: v}, TypeError, (name, expected, type(v).__name__)) for v in values]


def _bad_numbers(name: str, bound: str, *outside: float) -> list[OptionCase]:
    values = (*outside, NAN, INF, -INF)
    return [
        *(({name: v}, ValueError, (f"{name}: expected", "number", bound, v)) for v in values),
        *_bad_types(name, ": expected a number", True, "1", [1.0], 1j, torch.ones(1)),
    ]


def _bad_choices(name: str, first: str, *others: str) -> list[OptionCase]:
    texts = (f"{first} ", first.upper(), "", *others)
    return [
        *(({name: v}, ValueError, (f"{name}: expected one of {first!r}", repr(v))) for v in texts),
        *_bad_types(name, f": expected one of {first!r}", 0, True, b"mean", [first]),
    ]


BAD_OPTIONS: list[OptionCase] = [
    *_bad_numbers("beta", "> 0", 0.0, -2.0),
    # Too large for a float.
    ({"beta": 10**400}, ValueError, ("beta: expected", "number")),
    # Beyond these bounds, the product or quotient with a logit may leave float32's range.
    *_bad_numbers("logit_scale", ">= 1e-30", 0.0, -1.0, 1e-46),
    *_bad_numbers("softcap", ">= 1e-30 and <= 1e+30", 0.0, -30.0, 1e39, 1e-46),
    *_bad_numbers("gamma_beta_ratio", ""),
    *_bad_numbers("gamma", ""),
    *_bad_numbers("label_smoothing", ">= 0 and <= 0.5", -0.1, 0.51, 1.0),
    *_bad_numbers("sft_weight", ">= 0", -0.1),
    *_bad_numbers("normalizer", "> 0", 0.0, -1.0),
    *_bad_choices("loss_type", "sigmoid", "dpo", "simpo"),
    *_bad_choices("reduction", "none", "avg", "batchmean"),
    *_bad_types("reduction", ": expected one of 'none'", None),
    *_bad_choices("sft_reduction", "sequence", "tokens", "mean"),
    *_bad_choices("empty", "drop", "keep", "NaN"),
    *_bad_types("average_log_prob", ": expected a bool", 1, "True", np.True_),
    *_bad_types("shift", ": expected a bool", 0, "False", 1.0),
    *_bad_types("inplace_backward", ": expected a bool", 1, None, "True", np.True_),
    *_bad_types("ignore_index", ": expected an int", -100.0, None, True, "-100"),
    ({"ignore_index": 2**63}, ValueError, ("ignore_index", "64-bit", 2**63)),
    ({"ignore_index": -(2**63) - 1}, ValueError, ("ignore_index", "64-bit", -(2**63) - 1)),
    # An error even if both give the same margin.
    ({"gamma": 1.0, "gamma_beta_ratio": 0.5}, ValueError, ("gamma", "at most one", 1.0, 0.5)),
    # The margin gamma / beta is infinite.
    ({"gamma": 1e200, "beta": 1e-200}, ValueError, ("gamma", "expected", 1e200)),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, ("label_smoothing", "0", "hinge")),
    ({"reduction": "none", **TOKEN_SFT}, ValueError, ("sft_reduction", "'sequence'", "'token'")),
    ({"normalizer": 2.0, "reduction": "sum"}, ValueError, ("normalizer", "None", "sum", 2.0)),
    ({"normalizer": 2.0, "reduction": "none"}, ValueError, ("normalizer", "None", "none", 2.0)),
    ({"normalizer": (2.0,)}, ValueError, ("normalizer", "(pairs, tokens)", "got 1")),
    ({"normalizer": (2.0, 3.0, 4.0)}, ValueError, ("normalizer", "(pairs, tokens)", "got 3")),
    ({"normalizer": (0.0, 3.0)}, ValueError, ("normalizer[0]", "> 0", 0.0)),
    ({"normalizer": (2.0, NAN)}, ValueError, ("normalizer[1]", "> 0", "nan")),
    ({"normalizer": (2.0, "3")}, TypeError, ("normalizer[1]", "number", "str")),
    ({"normalizer": 2.0, **TOKEN_SFT}, ValueError, ("normalizer", "(pairs, tokens)", "token", 2.0)),
    # A list prints almost like the expected tuple, so the message must say list.
    ({"normalizer": [2.0, 3.0], **TOKEN_SFT}, TypeError, ("normalizer", "list")),
]


@pytest.mark.parametrize(
    ("function", "case"),
    [
        pytest.param(function, case, id=f"{function.__name__}-{str(case[0])[:60]}")
        for case in BAD_OPTIONS
        for function in FUNCTIONS
        if case[0].keys() <= inspect.signature(function).parameters.keys()
    ],
)
def test_invalid_option(function: Callable[..., object], case: OptionCase) -> None:
    options, error, parts = case
    inputs: dict[object, Any] = {simpo_loss_from_logps: (_logps(), _logps()), SimPOLoss: ()}
    with pytest.raises(error, match=message(*parts)):
        function(*inputs.get(function, (_logits(), _labels())), **options)


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "parts"),
    [
        ([0.0], _logps(), TypeError, ("chosen_logps", "torch.Tensor", "list")),
        (_logps(), None, TypeError, ("rejected_logps", "torch.Tensor", "NoneType")),
        (_logps().long(), _logps(), TypeError, ("chosen_logps", FLOATS, "torch.int64")),
        (_logps(), _logps().cfloat(), TypeError, ("rejected_logps", FLOATS, "torch.complex64")),
        (_logps()[None], _logps()[None], ValueError, ("chosen_logps", "[P]", f"[1, {P}]")),
        (_logps(), _logps()[:1], ValueError, ("rejected_logps", f"[{P}]", "[1]")),
        (_logps(), _logps().to("meta"), ValueError, ("rejected_logps", "device cpu", "meta")),
    ],
)
def test_invalid_logps(chosen: Any, rejected: Any, error: Any, parts: Any) -> None:
    with pytest.raises(error, match=message(*parts)):
        simpo_loss_from_logps(chosen, rejected)


# ---- backward ------------------------------------------------------------------------------------


def _overlapping(logits: Tensor) -> Tensor:
    """Rows whose starts are V - 1 elements apart."""
    return logits.flatten().as_strided((B, T, V), (T * (V - 1), V - 1, 1))


NOT_OVERWRITABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "leaf": (lambda h: h, "got a leaf"),
    "view": (lambda h: h[:, :, 1:], "got a leaf"),
    "view of view": (lambda h: h.view(-1, V).view(B, T, V), "got a leaf"),
    # A parameter may be a view of a buffer that does not require grad, as flattened parameters are.
    "buffer": (lambda h: h.detach().view(-1, V).requires_grad_().view(B, T, V), "got a leaf"),
    "expanded B": (lambda h: (2 * h)[:1].expand(B, T, V), "rows apart in memory, got strides [0"),
    "expanded T": (lambda h: (2 * h)[:, :1].expand(B, T, V), "rows apart in memory, got strides"),
    "overlapping": (lambda h: _overlapping(2 * h), "rows apart in memory, got strides"),
    "transposed": (lambda h: (2 * h).transpose(1, 2).contiguous().transpose(1, 2), "stride 1"),
    "strided": (lambda h: torch.cat((h, h), 2)[:, :, ::2], "stride 1"),
}


@pytest.mark.parametrize("case", NOT_OVERWRITABLE)
@pytest.mark.parametrize("scorer", ["token_logps", "sequence_logps", "simpo_loss"])
def test_logits_that_cannot_be_overwritten(scorer: str, case: str) -> None:
    make, expected = NOT_OVERWRITABLE[case]
    logits = make(_logits().requires_grad_())
    labels = _labels() % logits.shape[2]
    with pytest.raises(ValueError, match=message("inplace_backward: expected", expected)):
        SCORERS[scorer](logits, labels, inplace_backward=True)
    with torch.no_grad():  # Without a backward, nothing is overwritten.
        SCORERS[scorer](logits, labels, inplace_backward=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda h: (2 * h, lambda z: z.pow(2).sum()),  # Another function saved the logits.
        # Another function saved a view of them.
        lambda h: (2 * h, lambda z: z[:, 1:].exp().mul(z[:, 1:]).sum()),
        lambda h: (h.tanh(), lambda z: 0.0),  # Their producer saved them as its output.
        lambda h: (2 * h, lambda z: token_logps(z, _labels()).sum()),
        lambda h: (2 * h, lambda z: token_logps(z, _labels(), inplace_backward=True).sum()),
    ],
    ids=["saved", "view saved", "producer", "second loss", "second loss in place"],
)
def test_other_use_of_overwritten_logits_fails(use: Callable[[Tensor], Any]) -> None:
    logits, other = use(_logits().requires_grad_())
    more = other(logits)
    loss = simpo_loss(logits, _labels(), inplace_backward=True).loss + more
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_backward_in_place_fails() -> None:
    loss = simpo_loss(2 * _logits().requires_grad_(), _labels(), inplace_backward=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w: token_logps(h * w, _labels()).sum(),
        lambda h, w: sequence_logps(h * w, _labels()).pow(2).sum(),
        lambda h, w: simpo_loss(h * w, _labels()).loss,
        lambda h, w: simpo_loss(h * w, _labels(), inplace_backward=True).loss,
        lambda h, w: simpo_loss_from_logps(h[0, 0] * w, h[1, 1])[0].sum(),
        lambda h, w: simpo_loss_from_logps(h[0, 0] * w, h[1, 1])[0].pow(2).sum(),
    ],
    ids=["token_logps", "sequence_logps", "simpo_loss", "in place", "from_logps", "from_logps^2"],
)
def test_double_backward_fails(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    # Because of the product h * w, a second derivative exists even if the loss returns none.
    h, w = _logits().requires_grad_(), torch.ones(V, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"double backward|differentiate twice"):
        torch.autograd.grad(function(h, w), h, create_graph=True)[0].sum().backward()


def test_forward_mode_fails_instead_of_losing_the_tangent() -> None:
    with pytest.raises(NotImplementedError, match=r"jvp|forward"):
        torch.func.jvp(lambda x: token_logps(x, _labels()), (_logits(),), (_logits(),))


# ---- ops called directly -------------------------------------------------------------------------

OPS = torch.ops.simpo_ext
TENSORS: dict[str, Tensor] = {
    "logits": _logits(),
    "labels": _labels(),
    "token_logps": -_logits()[:, :, 0],
    "max": torch.zeros(B, T),
    "sum_exp": torch.ones(B, T, dtype=torch.float64),
    "counts": torch.full((B,), T - 1),
    "slopes": -torch.ones(2 * P),
    "pairs": torch.tensor([[0, 2], [1, 3]]),
    "pair_weight": torch.ones(P, dtype=torch.float64),
    "grad_loss": torch.ones(()),
    "grad_losses": torch.ones(P),
    "grad_sft_loss": torch.ones(()),
}
NUMBERS: dict[str, Any] = dict(
    ignore_index=-100, shift=True, average_log_prob=True, logit_scale=1.0, softcap=0.0, beta=2.0,
    gamma_beta_ratio=0.5, loss_type=0, label_smoothing=0.0, alpha=0.0, sft_weight=0.0,
    sft_reduction=0, reduction=1, empty=0, cu_seqlens=None,
)  # fmt: skip
OP_NAMES = ("token_logps", "token_logps_backward", "token_logps_backward_", "sequence_logps",
            "sequence_logps_backward", "preference_loss", "preference_loss_backward")  # fmt: skip


def _op_arguments(op: str) -> dict[str, Any]:
    """Valid arguments by name. grad_logps is [B, T] for the token ops and [B] for the others."""
    grad_logps = torch.ones(B, T) if op.startswith("token_logps") else torch.ones(B)
    known = {**TENSORS, **NUMBERS, "grad_logps": grad_logps}
    names = [argument.name for argument in getattr(OPS, op).default._schema.arguments]
    return {n: known[n].clone() if isinstance(known[n], Tensor) else known[n] for n in names}


SPOILERS: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda x: x[:-1] if x.dim() else x[None],
    "rank": lambda x: x[None],
    "int32": lambda x: x.int(),
    "bfloat16": lambda x: x.bfloat16(),
    "device": lambda x: x.to("meta"),
}
SPOILED = [
    (op, name, spoiler)
    for op in OP_NAMES
    for name, value in _op_arguments(op).items()
    for spoiler in SPOILERS
    if isinstance(value, Tensor) and (name, spoiler) != ("logits", "bfloat16")
]


@pytest.mark.parametrize(("op", "name", "spoiler"), SPOILED)
def test_ops_refuse_tensors_that_do_not_match(op: str, name: str, spoiler: str) -> None:
    arguments = _op_arguments(op)
    getattr(OPS, op)(**arguments)
    arguments = _op_arguments(op)
    arguments[name] = SPOILERS[spoiler](arguments[name])
    with pytest.raises(RuntimeError, match=r"expected|device"):
        getattr(OPS, op)(**arguments)


@pytest.mark.parametrize("name", ["loss_type", "sft_reduction", "reduction", "empty"])
@pytest.mark.parametrize("value", [-1, 3, 2**62])
def test_ops_refuse_unknown_enum_values(name: str, value: int) -> None:
    with pytest.raises(RuntimeError, match=message(f"{name}: expected", value)):
        OPS.preference_loss(**{**_op_arguments("preference_loss"), name: value})


@pytest.mark.cpu_only
@pytest.mark.parametrize("op", [op for op in OP_NAMES if op.startswith("token_logps")])
def test_ops_refuse_labels_out_of_range(op: str) -> None:
    arguments = _op_arguments(op)
    arguments["labels"][3, 4] = V
    # Newer versions of torch turn std::out_of_range into an IndexError.
    with pytest.raises((IndexError, RuntimeError), match=message("labels[3, 4]", f"got {V}")):
        getattr(OPS, op)(**arguments)


def test_the_in_place_op_refuses_rows_that_share_memory() -> None:
    arguments = _op_arguments("token_logps_backward_")
    for logits in (arguments["logits"][:1].expand(B, T, V), _overlapping(arguments["logits"])):
        with pytest.raises(RuntimeError, match="rows apart in memory"):
            OPS.token_logps_backward_(**{**arguments, "logits": logits})
