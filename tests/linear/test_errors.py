"""Errors of wrong arguments of the linear front end: their class and message."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from simpo_ext import LinearSimPOLoss, linear_simpo_loss, linear_token_logps
from support.messages import message

pytestmark = pytest.mark.kernels

P, T, H, V = 2, 5, 3, 7
B = 2 * P
FLOATS = "float64, float32, bfloat16, float16"
INTS = "int64, int32, int16, int8, uint8"


def _hidden() -> Tensor:
    return torch.linspace(-1.0, 1.0, B * T * H).reshape(B, T, H).clone()


def _weight() -> Tensor:
    return torch.linspace(-2.0, 1.0, V * H).reshape(V, H).clone()


def _labels() -> Tensor:
    return torch.arange(B * T).reshape(B, T) % V


def _bias() -> Tensor:
    return torch.linspace(0.0, 1.0, V)


SCORERS: dict[str, Callable[..., Any]] = {
    "linear_token_logps": linear_token_logps,
    "linear_simpo_loss": linear_simpo_loss,
    "LinearSimPOLoss": LinearSimPOLoss(),
}
FUNCTIONS = (linear_token_logps, linear_simpo_loss)
# Argument, its value, the error, and the parts of the message after "expected".
Case: TypeAlias = tuple[str, Callable[[], object], type[Exception], tuple[object, ...]]


def _bad_tensors(name: str, good: Callable[[], Tensor]) -> list[Case]:
    """Values that are not dense floating-point tensors on a device with kernels."""
    return [
        (name, lambda: good().tolist(), TypeError, ("torch.Tensor", "list")),
        (name, lambda: good().long(), TypeError, (FLOATS, "torch.int64")),
        (name, lambda: good() > 0, TypeError, (FLOATS, "torch.bool")),
        (name, lambda: good().cfloat(), TypeError, (FLOATS, "torch.complex64")),
        (name, lambda: good().to(torch.float8_e4m3fn), TypeError, (FLOATS, "torch.float8_e4m3fn")),
        (name, lambda: good().to_sparse(), TypeError, ("dense", "torch.sparse_coo")),
    ]


BAD_TENSORS: list[Case] = [
    *_bad_tensors("hidden", _hidden),
    *_bad_tensors("weight", _weight),
    *_bad_tensors("bias", _bias),
    ("hidden", lambda: None, TypeError, ("torch.Tensor", "NoneType")),
    ("weight", lambda: None, TypeError, ("torch.Tensor", "NoneType")),
    ("weight", lambda: torch.nn.Linear(H, V), TypeError, ("torch.Tensor", "Linear")),
    ("hidden", lambda: _hidden()[0], ValueError, ("[B, T, H]", f"[{T}, {H}]")),
    ("hidden", lambda: _hidden()[None], ValueError, ("[B, T, H]", f"[1, {B}, {T}, {H}]")),
    ("weight", lambda: _weight()[0], ValueError, (f"[{H}]",)),
    ("weight", lambda: _weight()[None], ValueError, (f"[1, {V}, {H}]",)),
    ("weight", lambda: _weight().t(), ValueError, (H, f"[{H}, {V}]")),
    ("weight", lambda: _weight()[:, :1], ValueError, (H, f"[{V}, 1]")),
    ("bias", lambda: _bias()[:-1], ValueError, (f"[{V}]", f"[{V - 1}]")),
    ("bias", lambda: _bias()[:1], ValueError, (f"[{V}]", "[1]")),  # broadcastable
    ("bias", lambda: _bias()[None], ValueError, (f"[{V}]", f"[1, {V}]")),
    ("bias", lambda: torch.ones(H), ValueError, (f"[{V}]", f"[{H}]")),
    ("weight", lambda: _weight().double(), TypeError, ("float32", "hidden", "float64")),
    ("weight", lambda: _weight().bfloat16(), TypeError, ("float32", "hidden", "bfloat16")),
    ("bias", lambda: _bias().half(), TypeError, ("float32", "hidden", "float16")),
    ("weight", lambda: _weight().to("meta"), ValueError, ("device cpu", "hidden", "meta")),
    ("bias", lambda: _bias().to("meta"), ValueError, ("device cpu", "hidden", "meta")),
    ("labels", lambda: _labels().tolist(), TypeError, ("torch.Tensor", "list")),
    ("labels", lambda: _labels().float(), TypeError, ("integer", "torch.float32")),
    ("labels", lambda: _labels() > 2, TypeError, ("integer", "torch.bool")),
    ("labels", lambda: _labels().to(torch.uint16), TypeError, (INTS, "torch.uint16")),
    ("labels", lambda: _labels().to_sparse(), TypeError, ("dense", "torch.sparse_coo")),
    ("labels", lambda: _labels()[0], ValueError, (f"[{B}, {T}]", f"[{T}]")),
    ("labels", lambda: _labels()[:, 1:], ValueError, (f"[{B}, {T}]", f"[{B}, {T - 1}]")),
    ("labels", lambda: _labels()[:1], ValueError, (f"[{B}, {T}]", f"[1, {T}]")),
    ("labels", lambda: _labels()[..., None], ValueError, (f"[{B}, {T}]", f"[{B}, {T}, 1]")),
    ("labels", lambda: _labels().to("meta"), ValueError, ("device cpu", "meta")),
]


@pytest.mark.parametrize("case", BAD_TENSORS, ids=lambda case: f"{case[0]}-{case[3][-1]}")
@pytest.mark.parametrize("scorer", SCORERS)
def test_invalid_tensor(scorer: str, case: Case) -> None:
    name, make, error, parts = case
    arguments: dict[str, Any] = {
        "hidden": _hidden(), "weight": _weight(), "labels": _labels(), "bias": _bias(), name: make()
    }  # fmt: skip
    with pytest.raises(error, match=message(f"{name}: expected", *parts)):
        SCORERS[scorer](**arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_hidden_states_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([_hidden()[0], _hidden()[1, :2]], layout=layout)
    with pytest.raises(TypeError, match=message("hidden: expected", "dense", "nested")):
        linear_token_logps(nested, _weight(), _labels())


@pytest.mark.parametrize("scorer", ["linear_simpo_loss", "LinearSimPOLoss"])
def test_an_odd_batch_cannot_be_split_into_pairs(scorer: str) -> None:
    with pytest.raises(ValueError, match=message("hidden: expected", "even B", "got 3")):
        SCORERS[scorer](_hidden()[:3], _weight(), _labels()[:3])
    assert linear_token_logps(_hidden()[:3], _weight(), _labels()[:3]).shape == (3, T)


# ---- labels out of range: errors on CPUs ---------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("label", [-1, -99, -101, V, V + 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_error_names_a_label_out_of_range(
    function: Callable[..., Any], label: int, shift: bool
) -> None:
    labels = _labels()
    labels[2, 3] = label
    labels[3, 1] = V  # Comes later in memory, so it is not reported.
    with pytest.raises(IndexError, match=message("labels[2, 3]", "-100", f"[0, {V})", label)):
        function(_hidden(), _weight(), labels, shift=shift)


@pytest.mark.cpu_only
def test_only_scored_labels_must_be_in_range() -> None:
    labels = _labels()
    labels[1, 0] = 99  # The shift does not score the first column.
    want = linear_token_logps(_hidden(), _weight(), _labels())
    assert torch.equal(linear_token_logps(_hidden(), _weight(), labels), want)
    with pytest.raises(IndexError, match=message("labels[1, 0]", "got 99")):
        linear_token_logps(_hidden(), _weight(), labels, shift=False)


@pytest.mark.cpu_only
def test_an_empty_vocabulary_has_no_valid_label() -> None:
    labels = torch.full((B, T), -100)
    logps = linear_token_logps(_hidden(), _weight()[:0], labels)
    assert torch.equal(logps, torch.zeros(B, T))
    labels[1, 2] = 0
    with pytest.raises(IndexError, match=message("labels[1, 2]", "got 0")):
        linear_token_logps(_hidden(), _weight()[:0], labels)


# ---- options -------------------------------------------------------------------------------------

OptionCase: TypeAlias = tuple[dict[str, Any], type[Exception], tuple[object, ...]]
BAD_OPTIONS: list[OptionCase] = [
    *(
        ({name: value}, TypeError, (f"{name}: expected", kind))
        for name in ("logits_budget_bytes", "num_valid_tokens")
        for value, kind in ((1.0, "float"), ("1", "str"), (True, "bool"), ([1], "list"),
                            (torch.ones(1), "Tensor"))
    ),
    *(
        ({name: value}, ValueError, (f"{name}: expected", value))
        for name in ("logits_budget_bytes", "num_valid_tokens")
        for value in (-1, -100, -(2**63), 2**63, 2**70)
    ),
    ({"beta": 0.0}, ValueError, ("beta: expected", 0.0)),
    ({"gamma_beta_ratio": float("nan")}, ValueError, ("gamma_beta_ratio: expected", "nan")),
    ({"gamma": 1.0, "gamma_beta_ratio": 0.5}, ValueError, ("gamma", "at most one", 1.0, 0.5)),
    ({"loss_type": "dpo"}, ValueError, ("loss_type: expected one of", "'dpo'")),
    ({"label_smoothing": 0.51}, ValueError, ("label_smoothing: expected", 0.51)),
    ({"sft_weight": -0.1}, ValueError, ("sft_weight: expected", -0.1)),
    ({"sft_reduction": "tokens"}, ValueError, ("sft_reduction: expected one of", "'tokens'")),
    ({"average_log_prob": 1}, TypeError, ("average_log_prob: expected a bool", "int")),
    ({"reduction": "avg"}, ValueError, ("reduction: expected one of", "'avg'")),
    ({"normalizer": 0.0}, ValueError, ("normalizer: expected", 0.0)),
    ({"normalizer": 2.0, "reduction": "sum"}, ValueError, ("normalizer", "None", "sum", 2.0)),
    ({"empty": "keep"}, ValueError, ("empty: expected one of", "'keep'")),
    ({"ignore_index": -100.0}, TypeError, ("ignore_index: expected an int", "float")),
    ({"ignore_index": 2**63}, ValueError, ("ignore_index", "64-bit", 2**63)),
    ({"shift": 1}, TypeError, ("shift: expected a bool", "int")),
    ({"logit_scale": 0.0}, ValueError, ("logit_scale: expected", ">= 1e-30", 0.0)),
    ({"softcap": -30.0}, ValueError, ("softcap: expected", ">= 1e-30 and <= 1e+30", -30.0)),
    ({"inplace_backward": 1}, TypeError, ("inplace_backward: expected a bool", "int")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "case"),
    [
        pytest.param(function, case, id=f"{function.__name__}-{str(case[0])[:60]}")
        for case in BAD_OPTIONS
        for function in (*FUNCTIONS, LinearSimPOLoss)
        if case[0].keys() <= inspect.signature(function).parameters.keys()
    ],
)
def test_invalid_option(function: Callable[..., object], case: OptionCase) -> None:
    options, error, parts = case
    # The module's constructor raises the error.
    inputs = () if function is LinearSimPOLoss else (_hidden(), _weight(), _labels())
    with pytest.raises(error, match=message(*parts)):
        function(*inputs, **options)


@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (1.0, TypeError)])
def test_a_call_of_the_module_checks_its_count(count: Any, error: type[Exception]) -> None:
    with pytest.raises(
        error,
        match=message(
            "num_valid_tokens: expected", type(count).__name__ if error is TypeError else count
        ),
    ):
        LinearSimPOLoss()(_hidden(), _weight(), _labels(), num_valid_tokens=count)


# ---- ops called directly -------------------------------------------------------------------------

OPS = torch.ops.simpo_ext
OP_NAMES = ("linear_token_logps", "linear_token_logps_backward")
VALID = B * (T - 1)


def _op_arguments(op: str) -> dict[str, Any]:
    """Valid arguments by name. The only chunk of logits is kept."""
    known: dict[str, Any] = dict(
        hidden=_hidden(), weight=_weight(), bias=_bias(), labels=_labels(), ignore_index=-100,
        shift=True, logit_scale=1.0, softcap=0.0, logits_budget_bytes=2**20,
        num_valid_tokens=VALID, needs_hidden=True, needs_weight=True, needs_bias=True,
    )  # fmt: skip
    if op == "linear_token_logps_backward":
        results = OPS.linear_token_logps(**_op_arguments("linear_token_logps"))
        known.update(zip(("grad_logps", "max", "sum_exp", "kept_logits"), results, strict=True))
        known["grad_logps"] = torch.ones(B, T)
    names = [argument.name for argument in getattr(OPS, op).default._schema.arguments]
    return {name: known[name] for name in names}


SPOILERS: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda x: x[:-1],
    "last shorter": lambda x: x[..., :-1],
    "rank": lambda x: x[None],
    "int32": lambda x: x.int(),
    "bfloat16": lambda x: x.bfloat16(),
    "device": lambda x: x.to("meta"),
}
# Without a bias, a shorter weight is a smaller vocabulary. Fewer kept chunks are valid, since the
# backward recomputes the others.
FITTING = {("kept_logits", "shorter")}
SPOILED = [
    (op, name, spoiler)
    for op in OP_NAMES
    for name in (*(("grad_logps", "max", "sum_exp", "kept_logits") if "back" in op else ()),
                 "hidden", "weight", "bias", "labels")
    for spoiler in SPOILERS
    if (name, spoiler) not in FITTING
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "spoiler"), SPOILED)
def test_ops_refuse_tensors_that_do_not_match(op: str, name: str, spoiler: str) -> None:
    arguments = _op_arguments(op)
    getattr(OPS, op)(**arguments)
    arguments[name] = SPOILERS[spoiler](arguments[name])
    with pytest.raises(RuntimeError, match=r"expected|device"):
        getattr(OPS, op)(**arguments)


@pytest.mark.parametrize(("name", "value"), [
    ("num_valid_tokens", -2), ("num_valid_tokens", -(2**63)),
])  # fmt: skip
def test_ops_refuse_invalid_numbers(name: str, value: int) -> None:
    with pytest.raises(RuntimeError, match=message(f"{name}: expected", value)):
        OPS.linear_token_logps(**{**_op_arguments("linear_token_logps"), name: value})


@pytest.mark.cpu_only
@pytest.mark.parametrize("op", OP_NAMES)
def test_ops_refuse_labels_out_of_range(op: str) -> None:
    arguments = _op_arguments(op)
    arguments["labels"][3, 4] = V
    # Newer versions of torch turn std::out_of_range into an IndexError.
    with pytest.raises((IndexError, RuntimeError), match=message("labels[3, 4]", f"got {V}")):
        getattr(OPS, op)(**arguments)


@pytest.mark.cpu_only
def test_the_backward_op_refuses_more_labels_than_the_forward_scored() -> None:
    arguments = _op_arguments("linear_token_logps")
    arguments["labels"][1, 1:] = -100
    arguments["num_valid_tokens"] = VALID - T + 1
    results = OPS.linear_token_logps(**arguments)
    backward = _op_arguments("linear_token_logps_backward")  # All labels are scored.
    backward.update(zip(("max", "sum_exp", "kept_logits"), results[1:], strict=True))
    with pytest.raises((ValueError, RuntimeError), match="expected"):
        OPS.linear_token_logps_backward(**backward)
