"""Requested metrics: mean logits and entropies, computed in the forward's pass over the logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import simpo_ext
from simpo_ext import _C, SimPOLoss, SimPOOutput, simpo_loss
from support.batches import DTYPES, Batch, make_batch

pytestmark = pytest.mark.kernels

OPS = torch.ops.simpo_ext
ALL = ("logits", "logits_all", "entropy")
ADDED = [f"{name}/{side}" for name in ALL for side in ("chosen", "rejected")]
NAN, INF = float("nan"), float("inf")


def z_of(logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The scaled and capped logits in float64."""
    z = logits.double() * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def entropy_of(z: Tensor) -> Tensor:
    logps = torch.log_softmax(z, -1)
    return -torch.where(logps == -INF, 0.0, logps.exp() * logps).sum(-1)


def is_valid(labels: Tensor, shift: bool = True, ignore_index: int = -100) -> Tensor:
    return (
        F.pad(labels[:, 1:], (0, 1), value=ignore_index) != ignore_index
        if shift
        else (labels != ignore_index)
    )


def expected_metrics(
    logits: Tensor,
    labels: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: bool = True,
    empty: str = "drop",
    **_: Any,
) -> dict[str, float]:
    """The metrics by their definition."""
    z = z_of(logits, logit_scale, softcap)
    valid, pairs = is_valid(labels, shift), len(labels) // 2
    has_tokens = valid.any(1)
    counted = [
        p for p in range(pairs) if empty == "nan" or (has_tokens[p] and has_tokens[pairs + p])
    ]
    metrics = {}
    for side, first in (("chosen", 0), ("rejected", pairs)):
        rows = [first + p for p in counted]
        tokens = valid[rows]
        metrics[f"logits/{side}"] = z.mean(-1)[rows][tokens].mean().item()
        metrics[f"logits_all/{side}"] = z[first : first + pairs].mean().item()
        metrics[f"entropy/{side}"] = entropy_of(z)[rows][tokens].mean().item()
    return {name: metrics[name] for name in ADDED}


def loss_and_gradient(batch: Batch, **options: Any) -> tuple[SimPOOutput, Tensor]:
    leaf = batch.logits.clone().requires_grad_()
    out = simpo_loss(leaf * 1, batch.labels, **options)
    return out, torch.autograd.grad(out.loss.sum(), leaf)[0]


def tolerance_of(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 2e-6


OPTIONS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.7},
    {"softcap": 6.0, "logit_scale": 1.5},
    {"shift": False},
    {"empty": "nan"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_metrics_match_their_definition(dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3, time=10, vocabulary=301, dtype=dtype)
    batch.labels[4] = -100  # drops a pair, unless empty="nan"
    out = simpo_loss(*batch, report=ALL, **options)
    want = {**simpo_loss(*batch, **options).metrics(), **expected_metrics(*batch, **options)}
    assert list(out.metrics()) == list(want)
    tolerance = tolerance_of(dtype)
    assert out.metrics() == pytest.approx(want, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_report_changes_no_bit_of_loss_and_gradient(
    dtype: torch.dtype, options: dict[str, Any], inplace: bool
) -> None:
    batch = make_batch(pairs=3, vocabulary=1021, dtype=dtype)
    want, want_gradient = loss_and_gradient(batch, **options)
    for report in (ALL, ("entropy",)):
        out, gradient = loss_and_gradient(batch, report=report, inplace_backward=inplace, **options)
        assert torch.equal(gradient, want_gradient)
        for name, ours, theirs in zip(out._fields, out, want, strict=False):
            ours = ours[: len(theirs)] if name == "metrics_values" else ours
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True)
        assert [x.requires_grad for x in out] == [x.requires_grad for x in want]


@pytest.mark.parametrize("report", [(), ("entropy",), ("logits_all", "logits"), list(ALL), {*ALL}])
def test_requested_metrics_have_a_fixed_order(report: Any) -> None:
    out = simpo_loss(*make_batch(), report=report)
    plain = simpo_loss(*make_batch())
    added = [f"{name}/{side}" for name in ALL if name in report for side in ("chosen", "rejected")]
    assert list(out.metrics()) == [*plain.metrics(), *added]
    everything = simpo_loss(*make_batch(), report=ALL).metrics()
    assert out.metrics() == {name: everything[name] for name in out.metrics()}


# ---- the op --------------------------------------------------------------------------------------

# A single logit; less than a vector; a vector but less than a step; blocks and a tail.
SIZES = [1, 5, 67, 4099]


def rows(vocabulary: int, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """[6, V]: random, flat, sure, increasing to the last, and two rows with -inf."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3.0 * torch.randn(6, vocabulary, generator=generator, dtype=torch.float64)
    logits[1] = 0.25
    logits[2] = -30.0
    logits[2, vocabulary // 2] = 0.0
    logits[3] = torch.linspace(-40.0, 0.0, vocabulary)
    logits[4, : vocabulary // 2] = -INF
    logits[5, vocabulary // 2 + 1 :] = -INF
    return (logits + offset).to(dtype)


@pytest.mark.parametrize("transform", [(1.0, 0.0), (0.7, 0.0), (1.5, 5.0)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_logit_and_entropy_of_every_token(
    dtype: torch.dtype, vocabulary: int, offset: float, transform: tuple[float, float]
) -> None:
    logits = rows(vocabulary, dtype, offset).view(2, 3, vocabulary)
    labels = torch.tensor([[0, vocabulary - 1, vocabulary // 2], [-100, 0, vocabulary // 2]])
    options = (-100, False, *transform)
    z = z_of(logits, transform[0], transform[1] or None)
    if dtype != torch.float64 and transform != (1.0, 0.0):
        # The kernels round a scaled logit to float32.
        z = z_of(logits.float(), transform[0], transform[1] or None).float().double()
    for all_positions in (False, True):
        logps, *saved, mean_logit, entropy = OPS.token_logps_report(
            logits, labels, *options, all_positions
        )
        plain = OPS.token_logps(logits, labels, *options)
        for ours, theirs in zip((logps, *saved), plain, strict=True):
            assert torch.equal(ours, theirs)
        assert mean_logit.dtype == entropy.dtype == torch.float64
        scored = labels != -100
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        mean = torch.where(scored | all_positions, z.mean(-1), 0.0)
        torch.testing.assert_close(mean_logit, mean, rtol=tolerance, atol=tolerance)
        # A probability has the relative error of the difference between its z and the largest.
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        if dtype != torch.float64 and transform != (1.0, 0.0) and offset:
            tolerance = 3e-3  # an ulp of z at 1e4 is 1e-3
        want = torch.where(scored, entropy_of(z), 0.0)
        torch.testing.assert_close(entropy, want, rtol=tolerance, atol=tolerance)
        assert (entropy >= 0.0).all()


def test_the_entropy_of_a_sure_row_keeps_its_digits() -> None:
    # 1 - p is 5e-8, so p rounded to float32 has no digits of it.
    logits = torch.full((1, 1, 501), -23.0)
    logits[0, 0, 300] = 0.0
    *_, entropy = OPS.token_logps_report(
        logits, torch.tensor([[300]]), -100, False, 1.0, 0.0, False
    )
    want = entropy_of(logits.double()).item()
    assert 1e-6 < want < 2e-6
    # Only the few terms in the sum of the label's lane lose digits.
    assert entropy.item() == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spoiler", [NAN, INF])
def test_a_row_that_is_no_distribution_has_entropy_nan(spoiler: float, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 3, 70, dtype=dtype)
    logits[0, 0, 69] = spoiler
    logits[0, 1] = -INF
    labels = torch.tensor([[1, 2, 3]])
    logps, _, _, mean_logit, entropy = OPS.token_logps_report(
        logits, labels, -100, False, 1.0, 0.0, False
    )
    assert logps.isnan().tolist() == entropy.isnan().tolist() == [[True, True, False]]
    assert not mean_logit[0, 0].isfinite()
    assert mean_logit[0, 1] == -INF
    torch.testing.assert_close(mean_logit[0, 2], logits[0, 2].double().mean())


# The rows are longer than one thread's share. The bits do not depend on the number of threads.
@pytest.mark.cpu_only
def test_long_rows_are_reported_by_any_number_of_threads() -> None:
    logits = torch.randn(2, 2, 140_001)
    logits[0, 0, :70_000] = -INF
    labels = torch.tensor([[3, -100], [140_000, 70_001]])
    arguments = (logits, labels, -100, False, 1.0, 0.0, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(OPS.token_logps_report(*arguments))
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    *_, mean_logit, entropy = results[0]
    torch.testing.assert_close(mean_logit, logits.double().mean(-1), rtol=1e-6, atol=1e-7)
    want = torch.where(labels == -100, 0.0, entropy_of(logits.double()))
    torch.testing.assert_close(entropy, want, rtol=1e-6, atol=1e-7)


CODE = """
import sys, torch, simpo_ext
logits, labels = torch.load(sys.argv[1])
out = [simpo_ext.cpu_capability()]
for transform in ((1.0, 0.0), (1.5, 5.0)):
    arguments = logits, labels, -100, False, *transform
    plain = torch.ops.simpo_ext.token_logps(*arguments)
    report = torch.ops.simpo_ext.token_logps_report(*arguments, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, report))
    out.append(report[3:])
torch.save(out, sys.argv[2])
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("level", _C.cpu_capabilities())
def test_every_instruction_set_reports_the_same(level: str, tmp_path: Path) -> None:
    logits = torch.cat([rows(8192 + 77, torch.bfloat16), rows(8192 + 77, torch.bfloat16, 1e4)])
    logits = logits.view(2, 6, -1)
    labels = torch.randint(8192, (2, 6), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = -100
    torch.save((logits, labels), tmp_path / "in.pt")
    command = [sys.executable, "-c", CODE, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "SIMPO_CPU_CAPABILITY": level}
    subprocess.run(command, check=True, env=environment)
    used, *results = torch.load(tmp_path / "out.pt")
    assert used == level
    for (mean_logit, entropy), transform in zip(results, ((1.0, None), (1.5, 5.0)), strict=True):
        z = z_of(logits, *transform)
        torch.testing.assert_close(mean_logit, z.mean(-1), rtol=1e-6, atol=1e-6)
        want = torch.where(labels == -100, 0.0, entropy_of(z))
        torch.testing.assert_close(entropy, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("all_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, all_positions: bool) -> None:
    logits, labels = make_batch(dtype=dtype)
    for strided in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1)):
        arguments = (strided.clone().requires_grad_(), labels, -100, True, 1.0, 0.0, all_positions)
        torch.library.opcheck(OPS.token_logps_report.default, arguments)


# ---- which logits are read -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits_are_read_only_for_logits_all(dtype: torch.dtype) -> None:
    batch = make_batch(dtype=dtype)
    masked = ~is_valid(batch.labels)
    spoilt = batch.logits.masked_fill(masked[..., None], NAN)
    report = ("logits", "entropy")
    out, want = (simpo_loss(x, batch.labels, report=report) for x in (spoilt, batch.logits))
    assert torch.equal(out.metrics_values, want.metrics_values)
    of_all = simpo_loss(spoilt, batch.labels, report=ALL).metrics()
    assert of_all["logits_all/chosen"] != of_all["logits_all/chosen"]
    del of_all["logits_all/chosen"], of_all["logits_all/rejected"]
    assert of_all == want.metrics()


def test_metrics_without_counted_pairs_are_nan() -> None:
    batch = make_batch()
    batch.labels[0] = batch.labels[3] = -100  # each pair has an empty completion
    metrics = simpo_loss(*batch, report=ALL).metrics()
    for side in ("chosen", "rejected"):
        assert metrics[f"logits/{side}"] != metrics[f"logits/{side}"]
        assert metrics[f"entropy/{side}"] != metrics[f"entropy/{side}"]
    means = batch.logits.double().mean(-1)
    assert metrics["logits_all/chosen"] == pytest.approx(means[:2].mean().item(), abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 5, 0)])
def test_empty_batches(shape: tuple[int, int, int]) -> None:
    out = simpo_loss(torch.randn(shape), torch.full(shape[:2], -100), report=ALL)
    assert all(value != value for value in list(out.metrics().values())[9:])


# ---- through every path --------------------------------------------------------------------------


@pytest.mark.parametrize("report", [ALL, ("logits",)])
@pytest.mark.cpu_only
def test_compiled_in_one_graph(report: Any) -> None:
    batch = make_batch(pairs=3)

    def step(logits: Tensor, labels: Tensor) -> SimPOOutput:
        return simpo_loss(logits, labels, report=report)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        leaf = batch.logits.clone().requires_grad_()
        out = call(leaf, batch.labels)
        results.append((out, torch.autograd.grad(out.loss, leaf)[0]))
    (want, want_gradient), (out, gradient) = results
    assert list(out.metrics()) == list(want.metrics())
    torch.testing.assert_close(out.metrics_values, want.metrics_values)
    torch.testing.assert_close(gradient, want_gradient)


def test_checkpoint() -> None:
    batch = make_batch()
    want, want_gradient = loss_and_gradient(batch, report=ALL)
    leaf = batch.logits.clone().requires_grad_()
    out = checkpoint(
        lambda x: simpo_loss(x * 1, batch.labels, report=ALL), leaf, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(out.loss, leaf)[0], want_gradient)
    assert torch.equal(out.metrics_values, want.metrics_values)


def test_no_grad() -> None:
    batch = make_batch()
    want = simpo_loss(*batch, report=ALL)
    with torch.no_grad():
        out = simpo_loss(batch.logits.clone().requires_grad_(), batch.labels, report=ALL)
    assert torch.equal(out.metrics_values, want.metrics_values)


def test_the_module_takes_a_report() -> None:
    batch = make_batch()
    module = SimPOLoss(report=["entropy", "logits"])
    assert module.report == ("logits", "entropy")
    assert "report=('logits', 'entropy')" in repr(module)
    want = simpo_loss(*batch, report=("logits", "entropy"))
    assert module(*batch).metrics() == want.metrics()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [simpo_loss, SimPOLoss, simpo_ext.LinearSimPOLoss])
@pytest.mark.parametrize(
    ("report", "error", "message"),
    [
        ("entropy", TypeError, "report: expected a sequence of names .* got str 'entropy'"),
        (3, TypeError, "report: expected a sequence of names .* got int"),
        (None, TypeError, "report: expected a sequence of names .* got NoneType"),
        ((1,), TypeError, "report: expected names out of .* got int"),
        (("entropie",), ValueError, "report: expected names out of .* got 'entropie'"),
    ],
)
def test_errors_name_the_argument(
    function: Any, report: Any, error: type[Exception], message: str
) -> None:
    arguments = make_batch() if function is simpo_loss else ()
    with pytest.raises(error, match=f"^{message}"):
        function(*arguments, report=report)
