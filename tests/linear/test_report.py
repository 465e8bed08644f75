"""Requested metrics from hidden states and lm_head, without all logits in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import simpo_ext
from simpo_ext import LinearSimPOLoss, SimPOOutput, linear_simpo_loss, simpo_loss
from simpo_ext._metrics import report as metrics_report
from support.batches import DTYPES
from support.linear_batches import CHUNK, OPS, UNLIMITED, LinearBatch, make_linear_batch

pytestmark = pytest.mark.kernels

ALL = ("logits", "logits_all", "entropy")
NAN = float("nan")


def from_logits(batch: LinearBatch, **options: Any) -> SimPOOutput:
    """The loss of all logits: computed in the inputs' dtype, then converted to float64."""
    hidden, weight, labels, bias = batch
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return simpo_loss(logits.double(), labels, **options)


def scored(batch: LinearBatch, **options: Any) -> tuple[SimPOOutput, list[Tensor]]:
    leaf = batch.leaves()
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **options)
    return out, list(torch.autograd.grad(out.loss.sum(), leaf.inputs()))


# Less than a chunk; two chunks; three chunks of which the last is narrower.
@pytest.mark.parametrize("vocabulary", [301, CHUNK + 3, 2 * CHUNK + 77])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_metrics_match_those_of_all_logits(
    dtype: torch.dtype, bias: bool, vocabulary: int
) -> None:
    batch = make_linear_batch(pairs=3, vocabulary=vocabulary, width=8, dtype=dtype, bias=bias)
    batch.labels[4] = -100  # drops a pair
    for budget in (0, UNLIMITED):
        out, _ = scored(batch, report=ALL, logit_scale=0.7, logits_budget_bytes=budget)
        got = out.metrics()
        want = from_logits(batch, report=ALL, logit_scale=0.7).metrics()
        assert list(got) == list(want)
        # The reference's logits are rounded to the dtype. The mean of all logits forms none.
        rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 2e-6)
        for name in got:
            near = rounding if "logits_all" in name else 2e-6
            tolerance = 1e-12 if dtype == torch.float64 else near
            assert got[name] == pytest.approx(want[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_report_changes_no_bit_of_loss_and_gradients(
    dtype: torch.dtype, softcap: float | None
) -> None:
    batch = make_linear_batch(vocabulary=CHUNK + 3, width=8, dtype=dtype)
    want, want_gradients = scored(batch, softcap=softcap)
    for report in (("logits", "entropy"), ("entropy",), () if softcap else ("logits_all",)):
        out, gradients = scored(batch, softcap=softcap, report=report)
        assert all(map(torch.equal, gradients, want_gradients))
        for name, ours, theirs in zip(out._fields, out, want, strict=False):
            assert torch.equal(ours[: len(theirs)] if name == "metrics_values" else ours, theirs)
    capped = from_logits(batch, softcap=softcap, report=("logits", "entropy")).metrics()
    got = scored(batch, softcap=softcap, report=("logits", "entropy"))[0].metrics()
    assert got == pytest.approx(capped, rel=2e-6, abs=2e-6)


def test_minus_infinity_in_some_chunks() -> None:
    """A bias of -inf over one and a half chunks, as in a padded vocabulary."""
    batch = make_linear_batch(vocabulary=3 * CHUNK, width=8, dtype=torch.float64)
    assert batch.bias is not None
    batch.bias[CHUNK // 2 : 2 * CHUNK + 5] = -torch.inf
    batch.labels[batch.labels > 0] %= CHUNK // 2
    got = scored(batch, report=ALL)[0].metrics()
    want = from_logits(batch, report=ALL).metrics()
    assert got == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert got["logits/chosen"] == got["logits_all/chosen"] == -torch.inf
    assert 0.0 < got["entropy/chosen"] < 10.0


@pytest.mark.parametrize("vocabulary", [50, CHUNK + 3])
def test_the_values_of_each_token_match_those_of_its_logits(vocabulary: int) -> None:
    batch = make_linear_batch(vocabulary=vocabulary, dtype=torch.float64)
    arguments = (*batch[:2], batch.bias, batch.labels, -100, True, 1.0, 0.0, 0)
    # With rows for masked positions, and without.
    for rows in (-1, int((batch.labels[:, 1:] != -100).sum())):
        *_, mean_logit, entropy = OPS.linear_token_logps_report(*arguments, rows)
        logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
        *_, want_mean, want_entropy = OPS.token_logps_report(
            logits, batch.labels, -100, True, 1.0, 0.0, False
        )
        torch.testing.assert_close(mean_logit, want_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=1e-12)


@pytest.mark.cuda_only
def test_tokens_beyond_num_valid_tokens_are_nan_in_a_report() -> None:
    batch = make_linear_batch()
    valid = batch.labels[:, 1:] != -100
    *_, mean_logit, entropy = OPS.linear_token_logps_report(
        *batch[:2], batch.bias, batch.labels, -100, True, 1.0, 0.0, 0, int(valid.sum()) - 2
    )
    for values in (mean_logit, entropy):
        assert values[:, :-1][valid].isnan().tolist()[-3:] == [False, True, True]
        assert int(values.isnan().sum()) == 2


def test_masked_hidden_states_are_read_only_for_logits_all() -> None:
    batch = make_linear_batch()
    masked = torch.ones_like(batch.labels, dtype=torch.bool)
    masked[:, :-1] = batch.labels[:, 1:] == -100
    spoilt = batch._replace(hidden=batch.hidden.masked_fill(masked[..., None], NAN))
    report = ("logits", "entropy")
    out, want = (linear_simpo_loss(*x[:3], bias=x.bias, report=report) for x in (spoilt, batch))
    assert torch.equal(out.metrics_values, want.metrics_values)
    of_all = linear_simpo_loss(*spoilt[:3], bias=spoilt.bias, report=ALL).metrics()
    assert of_all["logits_all/chosen"] != of_all["logits_all/chosen"]


def test_the_mean_of_all_logits_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 7, generator=generator).to(torch.bfloat16)[:, ::2]
    weight = torch.randn(11, 7, generator=generator).to(torch.bfloat16)
    bias = torch.randn(11, generator=generator).to(torch.bfloat16)
    want = 0.5 * (hidden.double() @ weight.double().T + bias.double()).mean(-1)
    for elements in (1, 20, 1 << 22):
        monkeypatch.setattr(metrics_report, "_CHUNK_ELEMENTS", elements)
        got = metrics_report.mean_logits(hidden, weight, bias, 0.5)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # Autocast must not round the products.
        assert torch.equal(metrics_report.mean_logits(hidden, weight, bias, 0.5), got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    batch = make_linear_batch(dtype=dtype).leaves()
    arguments = (*batch[:2], batch.bias, batch.labels, -100, True, 1.0, 0.0)
    for budget, rows in ((0, -1), (UNLIMITED, 26)):
        torch.library.opcheck(OPS.linear_token_logps_report.default, (*arguments, budget, rows))


@pytest.mark.cpu_only
def test_compiled_in_one_graph() -> None:
    batch = make_linear_batch(vocabulary=CHUNK + 3, width=4)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> SimPOOutput:
        return linear_simpo_loss(hidden, weight, labels, bias=bias, report=ALL)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        leaf = batch.leaves()
        out = call(*leaf)
        results.append((out, torch.autograd.grad(out.loss, leaf.inputs())))
    (want, want_gradients), (out, gradients) = results
    assert list(out.metrics()) == list(want.metrics())
    torch.testing.assert_close(out.metrics_values, want.metrics_values)
    torch.testing.assert_close(gradients, want_gradients)


def test_the_module_takes_a_report() -> None:
    hidden, weight, labels, bias = make_linear_batch()
    out = LinearSimPOLoss(report=ALL)(hidden, weight, labels, bias=bias)
    want = linear_simpo_loss(hidden, weight, labels, bias=bias, report=ALL)
    assert out.metrics() == want.metrics()


def test_logits_all_is_refused_with_a_softcap() -> None:
    batch = make_linear_batch()
    message = "^report: expected no 'logits_all' with a softcap, .* got softcap=6.0$"
    with pytest.raises(ValueError, match=message):
        linear_simpo_loss(*batch[:3], bias=batch.bias, softcap=6.0, report=ALL)
    with pytest.raises(ValueError, match=message):
        LinearSimPOLoss(softcap=6.0, report=ALL)
    simpo_ext.SimPOLoss(softcap=6.0, report=ALL)
