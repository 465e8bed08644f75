"""Edge cases: empty batches, values that are not finite, layouts, and the gradient of each output.

Random batches are compared with the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simpo_ext import SimPOOutput, sequence_logps, simpo_loss, simpo_loss_from_logps, token_logps
from support import oracle
from support.comparisons import assert_same

pytestmark = pytest.mark.kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf
P, T, V = 3, 5, 11
B = 2 * P
BLOCKS = 16_390  # Two blocks of the CPU kernels and a tail.


def _batch(dtype: torch.dtype = torch.float64, vocabulary: int = V) -> tuple[Tensor, Tensor]:
    """Logits and labels with a masked prompt, a hole and padding."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(B, T, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (B, T), generator=generator)
    labels[:, 0] = labels[1, 2] = labels[4, 3:] = -100
    return logits.to(dtype), labels


def _loss_and_grad(logits: Tensor, labels: Tensor, **options: Any) -> tuple[SimPOOutput, Tensor]:
    logits = logits.detach().requires_grad_()
    out = simpo_loss(logits, labels, **options)
    return out, torch.autograd.grad(out.loss.sum(), logits)[0]


def _logps_and_grad(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logps = token_logps(logits, labels, **options)
    weights = torch.arange(1.0, logps.numel() + 1.0, dtype=logps.dtype).view(logps.shape)
    return logps.detach(), torch.autograd.grad(logps, logits, weights)[0]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# [4, 1, 7] has labels that the shift does not score.
@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 5, 0), (4, 1, 7), (4, 5, 7)])
def test_loss_zero_without_scored_tokens(shape: Any, reduction: Any, inplace: bool) -> None:
    hidden, pairs = torch.full(shape, NAN, requires_grad=True), shape[0] // 2
    labels = torch.full(shape[:2], 3 if shape[1] == 1 else -100)
    options: dict[str, Any] = {"reduction": reduction, "sft_weight": 0.5}
    out = simpo_loss(1.0 * hidden, labels, inplace_backward=inplace, **options)
    nothing = torch.zeros((pairs,) if reduction == "none" else ())
    assert_same((out.loss, out.sft_loss, out.losses), (nothing, nothing, torch.zeros(pairs)))
    assert out.chosen_logps.isnan().all()
    assert not torch.autograd.grad(out.loss.sum(), hidden)[0].any()
    assert list(out.metrics().values()) == pytest.approx([NAN] * 6 + [0, pairs, 0], nan_ok=True)


@pytest.mark.parametrize("options", [{}, {"normalizer": 3.0}, {"sft_weight": 0.5}])
def test_empty_nan_makes_the_loss_nan_and_keeps_other_gradients(options: dict[str, Any]) -> None:
    logits, labels = _batch()
    labels[4] = -100
    out, grad = _loss_and_grad(logits, labels, empty="nan", **options)
    assert out.loss.isnan()
    assert out.losses.isnan().tolist() == [False, True, False]
    assert out.metrics()["num_pairs"] == P
    assert grad[1].isnan().all(dim=1).tolist() == [True, False, True, True, False]
    assert grad[[0, 2, 3, 4, 5]].isfinite().all()
    assert simpo_loss(logits[:0], labels[:0], empty="nan").loss.isnan()


def test_vocabulary_of_one_is_certain() -> None:
    logps, grad = _logps_and_grad(torch.randn(2, 3, 1), torch.zeros(2, 3, dtype=torch.int64))
    assert not torch.cat((logps, grad[..., 0])).any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_masked_logits_change_nothing(garbage: float, dtype: torch.dtype, inplace: bool) -> None:
    logits, labels = _batch(dtype)
    want, want_grad = _loss_and_grad(logits, labels, sft_weight=0.3)
    masked = torch.cat((labels[:, 1:] == -100, torch.ones(B, 1, dtype=torch.bool)), dim=1)
    hidden = logits.masked_fill(masked[..., None], garbage).requires_grad_()
    out = simpo_loss(hidden.clone(), labels, sft_weight=0.3, inplace_backward=inplace)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert_same((out, grad), (want, want_grad))
    assert not grad[masked].any()


@pytest.mark.parametrize("empty_rows", [[1], [P + 1], [1, P + 1]])
@pytest.mark.parametrize("options", [
    {}, {"reduction": "sum"}, {"sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "token"},
    {"loss_type": "hinge", "normalizer": 5.0},
])  # fmt: skip
def test_a_dropped_pair_equals_a_batch_without_it(options: Any, empty_rows: list[int]) -> None:
    logits, labels = _batch(torch.float32, 16)  # Removing rows keeps the others aligned.
    kept, dropped = [0, 2, 3, 5], [1, P + 1]
    labels[empty_rows] = -100
    logits[dropped] = NAN  # The side that has tokens is not read either.
    want, want_grad = _loss_and_grad(logits[kept], labels[kept], **options)
    out, grad = _loss_and_grad(logits, labels, **options)
    assert_same((out.loss, out.sft_loss, grad[kept]), (want.loss, want.sft_loss, want_grad))
    assert out.losses[1] == 0
    assert not grad[dropped].any()
    assert out.metrics() == {**want.metrics(), "dropped_pairs": 1.0}


def test_metrics_with_a_dropped_pair_match_the_oracle() -> None:
    logits, labels = _batch()
    labels[2] = -100
    want, _ = oracle.simpo_loss(logits.numpy(), labels.numpy())
    assert simpo_loss(logits, labels).metrics() == pytest.approx(want.metrics, rel=1e-13)


@pytest.mark.parametrize("mask", [3, 0, V - 1, -1, 2**63 - 1, -(2**63)])
def test_any_ignore_index_masks_even_one_that_is_a_token(mask: int) -> None:
    logits, labels = _batch()
    labels[labels == mask] = 5
    got = _logps_and_grad(logits, labels.masked_fill(labels == -100, mask), ignore_index=mask)
    assert_same(got, _logps_and_grad(logits, labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("at", [0, 1, 1024, 8191, 8192, BLOCKS - 1])
def test_a_nan_makes_only_its_row_nan(at: int, softcap: Any, dtype: torch.dtype) -> None:
    logits, labels = _batch(dtype, BLOCKS)
    want, want_grad = _logps_and_grad(logits, labels, softcap=softcap)
    logits[2, 3, at] = want[2, 3] = want_grad[2, 3] = NAN
    assert_same(_logps_and_grad(logits, labels, softcap=softcap), (want, want_grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [[INF, 0.0, 1.0], [INF, INF, -INF], [-INF, -INF, -INF]])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_row_that_is_no_distribution_is_nan(label: int, row: Any, dtype: torch.dtype) -> None:
    logits = torch.tensor([[row, [0.0, 1.0, 2.0]]], dtype=dtype)
    logps, grad = _logps_and_grad(logits, torch.tensor([[label, 1]]), shift=False)
    assert logps.isnan().tolist() == [[True, False]]
    assert grad.isnan().tolist() == [[[True] * 3, [False] * 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_softcap_bounds_infinite_logits(label: int, dtype: torch.dtype) -> None:
    logits = torch.tensor([[[INF, -INF, 0.0]]], dtype=dtype)
    logps, grad = _logps_and_grad(logits, torch.tensor([[label]]), shift=False, softcap=3.0)
    want = torch.tensor([3.0, -3.0, 0.0], dtype=logps.dtype).log_softmax(0)[label]
    torch.testing.assert_close(logps, want[None, None])
    assert (grad != 0).tolist() == [[[False, False, True]]]


# Each times its rounded inverse differs from 1 in float32; the last one also in float64.
@pytest.mark.parametrize("softcap", [41.0, 47.0, 49.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saturated_logit_has_no_gradient(dtype: torch.dtype, softcap: float) -> None:
    logits = torch.tensor([[[3e4, -3e4, 3e4, 0.0]]], dtype=dtype)
    _, grad = _logps_and_grad(logits, torch.tensor([[0]]), shift=False, softcap=softcap)
    assert grad[0, 0, :3].tolist() == [0.0, 0.0, 0.0]


# If one place rounded logit_scale * x and another fused it with a sum, the log-probability of a
# sure label would be off by half an ulp of z, which is 3e-5 at 700.
@pytest.mark.parametrize(("scale", "top", "gap"), [(0.7, 1003.3, 30.0), (1 / 0.9, 21.3, 18.0)])
@pytest.mark.parametrize("softcap", [None, 1e4])
def test_a_sure_label_keeps_its_digits_at_any_scale(
    softcap: float | None, scale: float, top: float, gap: float
) -> None:
    logits = torch.full((1, 1, 100), top - gap)
    logits[0, 0, 3] = top
    options: dict[str, Any] = {"shift": False, "logit_scale": scale, "softcap": softcap}
    logps, grad = _logps_and_grad(logits, torch.tensor([[3]]), **options)
    z = logits[0, 0].double() * float(np.float32(scale))
    slope = scale
    if softcap is not None:
        slope *= 1.0 - math.tanh(z[3].item() / softcap) ** 2
        z = softcap * (z / softcap).tanh()
    exact = z.log_softmax(0)[3].item()
    # The label's term is 1. Adding the others to it in float32 rounds off up to half an ulp of 1.
    assert logps.item() == pytest.approx(exact, rel=1e-3, abs=2.0**-24)
    assert grad[0, 0, 3].item() == pytest.approx(-math.expm1(exact) * slope, rel=1e-3, abs=2.0**-24)


def test_a_huge_softcap_bounds_nothing() -> None:
    batch = _batch(torch.float32)
    torch.testing.assert_close(token_logps(*batch, softcap=1e30), token_logps(*batch))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_token_of_probability_zero_decides_its_pair(loss_type: Any) -> None:
    logits, labels = _batch()
    options: dict[str, Any] = {"loss_type": loss_type, "reduction": "none"}
    logits[1, :, 0] = -INF  # Not a label: equal to a smaller vocabulary.
    logits[0, 1, labels[0, 2]] = -INF  # Chosen: the loss is infinite, and its slope is not 0.
    logits[5, 1, labels[5, 2]] = -INF  # Rejected: the loss and its slope are 0.
    out, grad = _loss_and_grad(logits, labels, **options)
    want, want_grad = oracle.simpo_loss(logits.numpy(), labels.numpy(), **options)
    assert out.loss.tolist() == [INF, pytest.approx(want.loss[1], rel=1e-13), 0.0]
    np.testing.assert_allclose(grad.numpy(), want_grad, rtol=1e-12, atol=1e-15)
    assert grad[0, 1, labels[0, 2]] < 0
    assert not grad[[2, 5]].any() and not grad[1, :, 0].any()


def test_a_saturated_hinge_pair_has_gradient_zero_unless_it_is_nan() -> None:
    logits, labels = _batch()
    logits[2].scatter_(1, labels[2, [1, 2, 3, 4, 1]][:, None], 50.0)
    for position, loss in ((4, 0.0), (1, NAN)):  # The shift masks the last position, 4.
        logits[5, position, 0] = NAN
        out, grad = _loss_and_grad(logits, labels, loss_type="hinge")
        assert out.losses[2].item() == pytest.approx(loss, nan_ok=True)
        assert not grad[[2, 5]].any() if loss == 0.0 else grad[2, 1].isnan().all()


@pytest.mark.parametrize(("margin", "slope"), [(0.875, -1.0), (1.0, 0.0), (1.125, 0.0)])
def test_hinge_has_subgradient_zero_at_its_kink(margin: float, slope: float) -> None:
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0 - margin])
    options: dict[str, Any] = {"beta": 1.0, "gamma_beta_ratio": 0.0, "loss_type": "hinge"}
    losses, _, _ = simpo_loss_from_logps(chosen, rejected, **options)
    assert losses.item() == max(0.0, 1.0 - margin)
    assert torch.autograd.grad(losses.sum(), chosen)[0].item() == slope


def test_row_with_incoming_gradient_zero_is_not_read() -> None:
    logits, labels = _batch()
    logits[0, 1] = NAN
    weights = torch.ones(B, T, dtype=logits.dtype)
    weights[0, 1] = 0.0
    (grad,) = torch.autograd.grad(token_logps(logits.requires_grad_(), labels), logits, weights)
    assert not grad[0, 1].any()
    assert grad.isfinite().all()


# The dtype represents offset + k * step exactly.
OFFSETS = [(torch.float32, 300.0, 0.5), (torch.float32, -300.0, 0.5), (torch.float32, 1e4, 0.5),
           (torch.float16, 6e4, 32.0), (torch.float16, -6e4, 32.0), (torch.bfloat16, -320.0, 2.0),
           (torch.float64, -1e4, 0.5)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "offset", "step"), OFFSETS)
def test_offset_of_all_logits_changes_nothing(dtype: Any, offset: float, step: float) -> None:
    logits, labels = _batch()
    logits = (logits / step).round() * step
    want, want_grad = _logps_and_grad(logits.to(dtype), labels)
    logps, grad = _logps_and_grad((logits + offset).to(dtype), labels)
    # Differences of logits are multiples of step, so the offset does not change their bits.
    assert torch.equal(logps, want)
    assert torch.equal(grad, want_grad)


# The scaled logits are multiples of 2^-20, which float32 represents exactly.
SUBNORMALS = [(torch.float64, -1070, 1020), (torch.float32, -145, 125), (torch.bfloat16, -133, 120),
              (torch.float16, -24, 20)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "unit", "scale"), SUBNORMALS)
def test_subnormal_logits_keep_their_value(dtype: torch.dtype, unit: int, scale: int) -> None:
    integers = torch.arange(-60.0, 60.0, dtype=torch.float64).reshape(2, 3, 20)
    labels = torch.tensor([[0, 19, 3], [7, 10, 11]])
    got = token_logps((integers * 2.0**unit).to(dtype), labels, logit_scale=2.0**scale)
    want = token_logps((integers * 2.0 ** (unit + scale)).to(got.dtype), labels)
    # The order of summation depends on the number of logits in 16 bytes.
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=0.0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "wider": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "time major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "batch expanded": lambda x: x[:1].expand_as(x),
}


# The order in which CUDA kernels sum depends on where 16-byte vectors begin. If the vocabulary is a
# multiple of 8, they begin at the same places in all these layouts.
@pytest.mark.parametrize("vocabulary", [pytest.param(BLOCKS, marks=pytest.mark.cpu_only), 2056])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_logits_and_labels_changes_no_bit(
    layout: str, dtype: torch.dtype, vocabulary: int
) -> None:
    logits, labels = (LAYOUTS[layout](x) for x in _batch(dtype, vocabulary))
    want = _logps_and_grad(logits.contiguous(), labels.contiguous())
    assert_same(_logps_and_grad(logits, labels), want)
    if layout in ("offset", "wider", "time major"):  # These rows can be overwritten.
        hidden = logits.contiguous().requires_grad_()
        logps = token_logps(LAYOUTS[layout](1.0 * hidden), labels, inplace_backward=True)
        weights = torch.arange(1.0, B * T + 1.0, dtype=logps.dtype).view(B, T)
        assert_same((logps, *torch.autograd.grad(logps, hidden, weights)), want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, labels = _batch()
    narrow = labels.masked_fill(labels == -100, 100).to(dtype)
    got = _loss_and_grad(logits, narrow, ignore_index=100)
    assert_same(got, _loss_and_grad(logits, labels))


@pytest.mark.parametrize("score", [
    token_logps, sequence_logps, lambda *args: simpo_loss(*args).losses,
    lambda *args: simpo_loss(*args, reduction="none").loss,
])  # fmt: skip
def test_layout_of_the_incoming_gradient_changes_no_bit(score: Callable[..., Tensor]) -> None:
    logits, labels = _batch()
    result = score(logits.requires_grad_(), labels)
    strided = torch.arange(2.0 * result.numel(), dtype=result.dtype).view(*result.shape, 2)[..., 1]
    for weights in (strided, strided.flatten()[0].expand_as(result)):
        got = torch.autograd.grad(result, logits, weights, retain_graph=True)
        want = torch.autograd.grad(result, logits, weights.contiguous(), retain_graph=True)
        assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_outputs_and_which_are_differentiable(dtype: torch.dtype) -> None:
    out, grad = _loss_and_grad(*_batch(dtype))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert grad.dtype == dtype
    assert [x.dtype for x in out] == [compute] * 7 + [torch.float64]
    assert [x.requires_grad for x in out] == [True] * 4 + [False] * 2 + [True, False]


OUTPUTS = ["loss", "losses", "chosen_logps", "rejected_logps", "sft_loss"]


@pytest.mark.parametrize("names", [*([name] for name in OUTPUTS), OUTPUTS], ids="+".join)
@pytest.mark.parametrize("options", [
    {"reduction": "none"}, {"average_log_prob": False, "reduction": "sum"}, {"normalizer": 4.0},
    {"sft_reduction": "token", "loss_type": "hinge"}, {"label_smoothing": 0.2},
])  # fmt: skip
def test_gradient_through_each_output_and_all_of_them(names: list[str], options: Any) -> None:
    logits, labels = _batch()
    labels[2] = -100  # Drops a pair, whose rejected_logps still have a gradient.
    options = {"sft_weight": 0.3, **options}
    out = simpo_loss(logits.requires_grad_(), labels, **options)
    outputs = [getattr(out, name) for name in names]
    weights = [torch.linspace(0.5, 1.5, max(x.numel(), 1)).to(x).view(x.shape) for x in outputs]
    grad = torch.autograd.grad(outputs, logits, weights)[0].numpy()

    x, y = logits.detach().numpy(), labels.numpy()
    logps, _, valid = oracle.token_logps(x, y)
    counts = np.maximum(valid.sum(1), 1) if options.get("average_log_prob", True) else np.ones(B)

    def of_loss(weight: Any, **changes: Any) -> Any:
        return oracle.preference_grad(logps, valid, grad_loss=weight, **{**options, **changes})

    plain = {"sft_weight": 0.0, "sft_reduction": "sequence", "normalizer": None}
    wants: dict[str, Callable[[Any], Any]] = {
        "loss": of_loss,
        "losses": partial(of_loss, reduction="none", **plain),
        "chosen_logps": lambda w: (np.append(w, 0 * w) / counts)[:, None] * valid,
        "rejected_logps": lambda w: (np.append(0 * w, w) / counts)[:, None] * valid,
        "sft_loss": lambda w: of_loss(w, sft_weight=1.0) - of_loss(w, sft_weight=0.0),
    }
    want = sum(wants[name](weight.numpy()) for name, weight in zip(names, weights, strict=True))
    np.testing.assert_allclose(grad, oracle.token_logps_grad(want, x, y), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    logits, labels = _batch(dtype, BLOCKS)
    logps = token_logps(logits, labels, shift=False)
    for (b, t), logp in np.ndenumerate(logps.numpy()):
        assert token_logps(logits[b, t, None, None], labels[b, t, None, None], shift=False) == logp


# Logits and tokens for more than one thread; in the last shape, threads share a row.
@pytest.mark.cpu_only
@pytest.mark.parametrize("shape", [(4, 64, 1500), (4, 40_000, 2), (2, 4, 140_000)])
def test_threads_and_repetition_change_no_bit(shape: Any, request: Any) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    labels = (logits[..., 0] > 0).long().masked_fill(logits[..., 1] > 1, -100)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(_loss_and_grad(logits, labels, sft_weight=0.3))
    assert_same(results[1:], results[:1] * 2)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_batches_agree_with_the_oracle(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = 2 * pick(0, 1, 2, 3), pick(0, 1, 2, 6), pick(1, 2, 7, 64, 1025, 8200)
    values = rng.standard_normal(shape) * pick(0.0, 1.0, 30.0) + pick(0.0, 0.0, 300.0, -300.0)
    values[rng.random(shape) < pick(0.0, 0.0, 0.1)] = -INF
    logits = torch.from_numpy(values).to(pick(*DTYPES))
    labels = torch.from_numpy(rng.integers(0, shape[2], shape[:2]))
    labels[torch.from_numpy(rng.random(shape[:2])) < pick(0.0, 0.3, 0.9)] = -100
    options: dict[str, Any] = {
        "shift": pick(True, False), "logit_scale": pick(1.0, 0.7, 3.0),
        "softcap": pick(None, None, 30.0, 2.0), "beta": pick(0.1, 2.0, 10.0),
        "gamma_beta_ratio": pick(0.0, 0.3, -1.1), "sft_weight": pick(0.0, 0.3),
        "average_log_prob": pick(True, False), "empty": pick("drop", "nan"),
        **pick({"loss_type": "hinge"}, {"label_smoothing": 0.0}, {"label_smoothing": 0.2}),
        **pick({"reduction": "sum"}, {"reduction": "none"}, {"normalizer": (3.0, 7.0)}, {}),
    }  # fmt: skip
    if options.get("reduction") != "none":
        options["sft_reduction"] = pick("sequence", "token")

    out, grad = _loss_and_grad(logits, labels, **options)
    want, want_grad = oracle.simpo_loss(logits.double().numpy(), labels.numpy(), **options)
    # The log-probability of a token is off by a few roundings of the largest logit plus log V. The
    # errors of its tokens add up to that of a sequence. A loss multiplies the errors of both sides
    # by beta, and adds them up.
    z = options["logit_scale"] * logits.double().masked_fill(logits == -INF, 0.0)
    largest = options["softcap"] or z.abs().amax().item() if z.numel() else 0.0
    eps, beta = torch.finfo(out.loss.dtype).eps, options["beta"]
    token = 2.0 * eps * (largest + 8.0)
    sequence = token * (1 if options["average_log_prob"] else max(labels.shape[1], 1))
    loss = (2.0 * beta + 1.0) * sequence * max(labels.numel(), 1)
    for name in OUTPUTS:
        np.testing.assert_allclose(
            getattr(out, name).detach().numpy(), getattr(want, name),
            rtol=2.0 * eps, atol=sequence if "logps" in name else loss, err_msg=name,
        )  # fmt: skip
    # The slope changes by beta^2 / 4 with the margin. Then the gradient is rounded once to its
    # dtype; float16 has multiples of 2^-24.
    slope = options["logit_scale"] * (token * (beta + 1.0) + beta**2 * sequence)
    smallest = 2.0**-25 if logits.dtype == torch.float16 else 0.0
    rtol = torch.finfo(grad.dtype).eps / 2 + 4.0 * eps
    np.testing.assert_allclose(grad.double().numpy(), want_grad, rtol=rtol, atol=slope + smallest)
