"""Checks the preference loss and its backward against tests/support/oracle.py."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from simpo_ext._ops.records import ENUMS, METRIC_NAMES
from support import oracle

from ..harness.buffers import ROUNDING, Buffer
from ..harness.checks import Checks
from ..harness.kernels import Kernels
from ..interpreter.module import Array
from .sequences import Batch, Layout, make_batch


class Case(NamedTuple):
    layout: Layout
    options: dict[str, Any]  # of oracle.PreferenceOptions
    pairs: Array | None = None
    has_weights: bool = False
    all_gradients: bool = True  # are given; otherwise only the gradient of the loss


class Outputs(NamedTuple):
    """What the forward writes."""

    sums: Buffer
    loss: Buffer
    losses: Buffer
    logps: Buffer
    rewards: Buffer
    sft_loss: Buffer
    metrics: Buffer
    slopes: Buffer
    counts: Buffer


def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    rows = Layout((8, 21), seed=3, empties=(1, 6))
    flat = Layout(lengths=(5, 9, 0, 30, 2, 11), seed=4)
    shared = rng.integers(0, 6, (5, 2))  # pairs that share sequences
    found = [
        Case(Layout(lengths=(2, 4086), seed=9), {"alpha": 0.1}),
        *(
            # Saturated, and with infinite slopes of the rewards.
            Case(
                Layout((6, 30), seed=10),
                {"loss_type": loss, "alpha": alpha, "beta": 40.0, "average_log_prob": False},
            )
            for loss, alpha in itertools.product(ENUMS["loss_type"], (0.0, 30.0))
        ),
    ]
    for reduction, empty in itertools.product(ENUMS["reduction"], ("drop", "nan")):
        how = {"reduction": reduction, "empty": empty}
        found += [
            Case(rows, {**how, "sft_weight": 0.3}),
            Case(flat, {**how, "alpha": 0.2}, shared, has_weights=True),
            Case(flat, {**how, "loss_type": "hinge", "beta": 10.0}, all_gradients=False),
            Case(rows._replace(shift=True), {**how, "loss_type": "ipo"}, has_weights=True),
        ]
    by_token = {"sft_reduction": "token"}
    found += [
        Case(rows, {"label_smoothing": 0.2, "alpha": 1.5, "average_log_prob": False}),
        Case(rows, {"label_smoothing": 0.1, "sft_weight": 2.0, **by_token}),
        Case(flat, {"sft_weight": 0.5, "empty": "nan", **by_token}, shared, has_weights=True),
        Case(flat, {"loss_type": "hinge", "alpha": 0.5}, shared[:1]),
        Case(flat, {}, shared[:0]),
        # More pairs or sequences than a block has threads.
        Case(Layout((700, 3), seed=6), {"sft_weight": 0.1}),
        Case(Layout((1100, 2), seed=7), {}, rng.integers(0, 1100, (300, 2)), has_weights=True),
        Case(Layout((6, 9), seed=7), {}, rng.integers(0, 6, (2000, 2)), has_weights=True),
        Case(Layout((2, 2600), seed=8), {"reduction": "sum"}),
    ]
    # exp and expm1 of doubles, in all of their ranges.
    found += [
        Case(
            Layout((100, 3), seed=11, amplitude=amplitude),
            {"alpha": alpha, "label_smoothing": 0.1},
        )
        for alpha, amplitude in itertools.product((0.0, 0.01, 0.3), (1e-3, 0.1, 3.0, 1000.0))
    ]
    return found


def check_preference(kernels: Kernels, checks: Checks) -> None:
    for dtype in ("float32", "float64"):
        for case in cases():
            check_case(kernels, checks, dtype, case)
        check_absent_pairs(kernels, checks, dtype)
        for has_indices, empty in itertools.product((False, True), ("drop", "nan")):
            check_many_pairs(kernels, checks, dtype, has_indices, empty)


@np.errstate(all="ignore")
def check_case(kernels: Kernels, checks: Checks, dtype: str, case: Case) -> None:
    batch = make_batch(dtype, case.layout)
    rng = np.random.default_rng(5)
    P = batch.S // 2 if case.pairs is None else len(case.pairs)
    name = f"{dtype} S={batch.S} P={P} flat={batch.is_flat} {case.options}"
    options, weight = dict(case.options), None
    if case.has_weights:
        weight = rng.random(P) * 2.0
        weight[rng.random(P) < 0.3] = 0.0
        options["pair_weight"] = weight
    common = _members(batch, dtype, oracle.PreferenceOptions(**options), case.pairs, weight, P)
    outputs = _forward(kernels, batch, dtype, common, oracle.PreferenceOptions(**options), P)
    data = {"pairs": case.pairs, "cu_seqlens": batch.cu_seqlens}
    want = oracle.preference_loss(batch.values, batch.valid, **data, **options)

    for what, got, expected in (
        ("loss", outputs.loss, want.loss),
        ("losses", outputs.losses, want.losses),
        ("logps", outputs.logps, np.concatenate([want.chosen_logps, want.rejected_logps])),
        ("rewards", outputs.rewards, np.concatenate([want.chosen_rewards, want.rejected_rewards])),
        ("sft_loss", outputs.sft_loss, want.sft_loss),
    ):
        expected = np.asarray(expected).astype(dtype).astype(np.float64)  # may overflow to infinity
        size = np.where(np.isfinite(expected), np.abs(expected), 0.0)
        # Everything is computed in float64, which rounds relative to the largest term.
        of_terms = 16.0 * ROUNDING["float64"] * (1.0 + size.max(initial=0.0))
        allowed = 4.0 * ROUNDING[dtype] * size + of_terms
        checks.close(f"preference {what}", name, got.get(), expected, allowed)
    metrics = np.array([want.metrics[key] for key in METRIC_NAMES])
    allowed = 64.0 * ROUNDING["float64"] * (1.0 + np.abs(metrics))
    checks.close("preference metrics", name, outputs.metrics.get(), metrics, allowed)

    # ---- backward
    is_each = options.get("reduction") == "none"
    shape = (P,) if is_each else ()
    sizes = {"loss": shape, "losses": (P,), "logps": (2 * P,), "sft_loss": shape}
    grads = {
        key: batch.device.put(rng.standard_normal(size) * np.ones(size), dtype)
        for key, size in sizes.items()
        if case.all_gradients or key == "loss"
    }
    got = _backward(kernels, batch, dtype, common, outputs, grads, is_each)
    given: dict[str, Any] = {f"grad_{key}": grad.get() for key, grad in grads.items()}
    if (of_logps := given.pop("grad_logps", None)) is not None:
        given |= {"grad_chosen_logps": of_logps[:P], "grad_rejected_logps": of_logps[P:]}
    grad = oracle.preference_grad(batch.values, batch.valid, **given, **data, **options)
    if dtype == "float32":
        is_infinite = np.abs(grad) > np.finfo(np.float32).max
        grad = np.where(is_infinite, np.copysign(np.inf, grad), grad)
    size = np.where(np.isfinite(grad), np.abs(grad), 0.0)
    ulp = 4.0 if dtype == "float32" else 32.0  # terms of a sequence may cancel
    allowed = ulp * ROUNDING[dtype] * (size + 0.2 * size.max(initial=0.0)) + 1e-300
    checks.close("preference gradient", name, got, grad, allowed)


def _members(
    batch: Batch,
    dtype: str,
    options: oracle.PreferenceOptions,
    pairs: Array | None,
    weight: Array | None,
    P: int,
) -> dict[str, Any]:
    """The members that the arguments of forward and backward share."""
    put = batch.device.put
    return {
        "dtype": dtype,
        **batch.members,
        "pairs": {
            "indices": None if pairs is None else put(pairs, "int64"),
            "weights": None if weight is None else put(weight, "float64"),
            "P": P,
        },
        "average": options.average_log_prob,
        "reduction": {
            "reduction": ENUMS["reduction"].index(options.reduction),
            "sft_reduction": int(options.sft_reduction == "token"),
            "empty": int(options.empty == "nan"),
            "sft_weight": options.sft_weight,
        },
    }


def _forward(
    kernels: Kernels,
    batch: Batch,
    dtype: str,
    common: dict[str, Any],
    options: oracle.PreferenceOptions,
    P: int,
) -> Outputs:
    out, S = batch.device.out, batch.S
    shape = (P,) if options.reduction == "none" else ()
    outputs = Outputs(
        sums=out((S,), "float64"),
        loss=out(shape, dtype),
        losses=out((P,), dtype),
        logps=out((2 * P,), dtype),
        rewards=out((2 * P,), dtype),
        sft_loss=out(shape, dtype),
        metrics=out((len(METRIC_NAMES),), "float64"),
        slopes=out((2 * P,), dtype),
        counts=out((S,), "int64"),
    )
    pair_loss = {
        "type": ENUMS["loss_type"].index(options.loss_type),
        "beta": options.beta,
        "gamma_beta_ratio": options.margin,
        "label_smoothing": options.label_smoothing,
        "alpha": options.alpha,
    }
    kernels.call(
        "preference_loss",
        batch.device.memory,
        **common,
        **batch.token_members,
        pair_loss=pair_loss,
        **outputs._asdict(),
    )
    return outputs


def _backward(
    kernels: Kernels,
    batch: Batch,
    dtype: str,
    common: dict[str, Any],
    outputs: Outputs,
    grads: dict[str, Buffer],
    is_each: bool,
) -> Array:
    """The gradient of the token log-probs, given incoming gradients by name."""
    out = batch.gradient_out(dtype)
    kernels.call(
        "preference_loss_backward",
        batch.device.memory,
        **common,
        slopes=outputs.slopes,
        counts=outputs.counts,
        grad_loss=grads.get("loss"),
        grad_loss_stride=int(is_each),
        grad_losses=grads.get("losses"),
        grad_losses_stride=1,
        grad_logps=grads.get("logps"),
        grad_logps_stride=1,
        grad_sft_loss=grads.get("sft_loss"),
        grad_sft_loss_stride=int(is_each),
        grad_token_logps=out,
    )
    return out.get()


def check_absent_pairs(kernels: Kernels, checks: Checks, dtype: str) -> None:
    """A pair with a sequence that does not exist has a loss of NaN. Other pairs keep theirs."""
    batch = make_batch(dtype, Layout(lengths=(3, 4, 6, 5), seed=1, density=1.0))
    pairs = np.array([[0, 1], [-1, 2], [2, 4], [2**40, -(2**40)], [3, 2]])
    options, P = oracle.PreferenceOptions(reduction="none"), len(pairs)
    common = _members(batch, dtype, options, pairs, None, P)
    outputs = _forward(kernels, batch, dtype, common, options, P)
    is_nan = np.isnan(outputs.losses.get())
    checks.equal("absent pairs", dtype, is_nan, [False, True, True, True, False])
    grads = {"loss": batch.device.put(np.ones(P), dtype)}
    gradient = _backward(kernels, batch, dtype, common, outputs, grads, is_each=True).reshape(-1)
    is_nan = np.array([np.isnan(gradient[span]).all() for span in batch.spans()])
    checks.equal("absent pairs' gradient", dtype, is_nan, [False, False, True, False])


def check_many_pairs(
    kernels: Kernels, checks: Checks, dtype: str, has_indices: bool, empty: str
) -> None:
    """The backward of more pairs than its loops take in one iteration, for the last sequences.

    Sequences have one token, so that a gradient is a slope divided by the number of pairs.
    """
    rng, P, num_blocks = np.random.default_rng(2), 256 * 15 + 10, 8
    batch = make_batch(dtype, Layout((2 * P, 1), seed=2, density=0.9))
    S, num_all_blocks = 2 * P, 1024
    indices = np.stack([np.arange(P), P + np.arange(P)], axis=1) if has_indices else None
    options = oracle.PreferenceOptions(empty=empty)
    common = _members(batch, dtype, options, indices, None, P)
    valid = batch.valid[:, 0]
    is_counted = (valid[:P] & valid[P:]) | (empty == "nan")
    slopes = rng.standard_normal(S) * np.tile(is_counted, 2)
    put, out = batch.device.put, batch.gradient_out(dtype)
    stored, gradient = put(slopes, dtype), put(0.75, dtype)
    kernels.last_blocks = num_blocks
    kernels.call(
        "preference_loss_backward",
        batch.device.memory,
        **common,
        slopes=stored,
        counts=put(valid, "int64"),
        grad_loss=gradient,
        grad_loss_stride=0,
        grad_losses=None,
        grad_losses_stride=0,
        grad_logps=None,
        grad_logps_stride=0,
        grad_sft_loss=None,
        grad_sft_loss_stride=0,
        grad_token_logps=out,
    )
    kernels.last_blocks = None
    of_last_blocks = np.arange(S) % num_all_blocks >= num_all_blocks - num_blocks
    name = f"{dtype} indices={has_indices} empty={empty}"
    written = out.written()[:, 0]
    checks.equal("sequences of the last blocks", name, written, of_last_blocks)
    want = np.where(valid, 0.75 * stored.get() / is_counted.sum(), 0.0)
    got = out.get(whole=False)[:, 0][written]
    allowed = 4.0 * ROUNDING[dtype] * np.abs(want[written])
    checks.close("gradient of many pairs", name, got, want[written], allowed)
