"""Edge cases of the linear front end: strides, offsets beyond 2^31 elements, and allocated memory.

Random batches are compared with the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simpo_ext import linear_simpo_loss, linear_token_logps
from support import linear_oracle
from support.batches import DTYPES, far_apart
from support.linear_batches import (
    CHUNK,
    UNLIMITED,
    LinearBatch,
    dense_logps,
    logps_op,
    make_linear_batch,
    upstream_of,
)
from support.memory import peak_bytes

pytestmark = pytest.mark.kernels


# ---- layouts -------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """The tensor with its last two dimensions swapped in memory, such as a weight [H, V].t()."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "wider": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "first dimensions swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimensions swapped": transposed,
    "last dimension strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "every other row": lambda x: torch.stack((x, x), -2).flatten(-3, -2)[..., ::2, :],
    "first expanded": lambda x: x[:1].expand_as(x),
    "last expanded": lambda x: x[..., :1].expand_as(x),
    "all expanded": lambda x: x[(slice(0, 1),) * x.dim()].expand_as(x),
}


def gradients_of_the_inputs(batch: LinearBatch) -> list[Tensor]:
    """logps and the gradients of the batch's own tensors, which keep their strides."""
    inputs = [x.detach().requires_grad_() for x in batch.inputs()]
    logps = linear_token_logps(*inputs[:2], batch.labels, bias=inputs[2])
    upstream = upstream_of(batch.labels).to(logps.dtype)
    return [logps.detach(), *torch.autograd.grad(logps, inputs, upstream)]


OF_VECTORS = ("offset", "last dimension strided", "last expanded")
CASES = [
    (name, layout)
    for name in ("hidden", "weight", "bias", "labels", "all")
    for layout in LAYOUTS
    if name != "bias" or layout in OF_VECTORS
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layouts_change_only_the_order_of_sums(name: str, layout: str, dtype: torch.dtype) -> None:
    batch = make_linear_batch(vocabulary=4099, width=6, dtype=dtype)
    fields = [f for f in LinearBatch._fields if f != "bias" or layout in OF_VECTORS]
    changed = {
        field: LAYOUTS[layout](getattr(batch, field))
        for field in (fields if name == "all" else [name])
    }
    batch = batch._replace(**changed)
    contiguous = LinearBatch(*(x.clone(memory_format=torch.contiguous_format) for x in batch))
    want = gradients_of_the_inputs(contiguous)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for got, expected in zip(gradients_of_the_inputs(batch), want, strict=True):
        assert got.shape == expected.shape
        bound = tolerance * max(1.0, expected.double().abs().max().item())
        assert (got.double() - expected.double()).abs().max() <= bound


@pytest.mark.emulation  # The routing would copy the whole file to the GPU.
@pytest.mark.parametrize(("name", "dim"), [("hidden", 0), ("hidden", 1), ("hidden", 2),
                                           ("weight", 0), ("weight", 1)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_offsets_beyond_2_31_elements(
    dtype: torch.dtype, name: str, dim: int, tmp_path: Path
) -> None:
    batch = make_linear_batch(pairs=1, time=3, vocabulary=5, width=3, dtype=dtype)
    want = gradients_of_the_inputs(batch)
    far = far_apart(getattr(batch, name), tmp_path / name, dim)
    got = gradients_of_the_inputs(batch._replace(**{name: far}))
    for ours, theirs in zip(got, want, strict=True):
        tolerance = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- memory --------------------------------------------------------------------------------------


def sizes(batch: LinearBatch) -> tuple[int, int, int, int]:
    """The bytes of all logits, of one chunk, of the gradients, and of small tensors.

    The small ones are a few [rows, H] in float32, numbers by row, and the scratch of bfloat16's
    GEMM, which grows with the chunk because H is small.
    """
    element, rows = batch.hidden.element_size(), batch.labels.numel()
    kept = logps_op(batch, UNLIMITED)[3]
    chunk = kept[0].numel() * element
    gradients = sum(x.numel() for x in batch.inputs()) * element
    logits = rows * batch.weight.shape[0] * element
    return logits, chunk, gradients, 4 * rows * batch.hidden.shape[2] * 4 + chunk // 4 + 2**16


# The budget is in chunks. The loss always holds one.
@pytest.mark.emulation
@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_within_gradients_and_budget(dtype: torch.dtype, chunks: int) -> None:
    batch = make_linear_batch(pairs=2, time=40, vocabulary=8 * CHUNK, width=8, dtype=dtype)
    batch.labels.clamp_(min=0)  # All rows are scored.
    logits, chunk, gradients, small = sizes(batch)
    leaf = batch.leaves()

    def step() -> None:
        linear_simpo_loss(
            *leaf[:3], bias=leaf.bias, logits_budget_bytes=chunks * chunk
        ).loss.backward()

    peak = peak_bytes(step)
    bound = gradients + max(chunks, 1) * chunk + small
    assert peak <= bound
    if chunks <= 2:
        assert bound < 0.75 * logits  # The bound must be below the size of all logits.


@pytest.mark.emulation
def test_evaluation_holds_one_chunk_for_any_budget() -> None:
    batch = make_linear_batch(pairs=2, time=40, vocabulary=8 * CHUNK, width=8)
    batch.labels.clamp_(min=0)
    _, chunk, _, small = sizes(batch)
    for inputs in (batch, batch.leaves()):
        with torch.no_grad():
            peak = peak_bytes(
                lambda inputs=inputs: linear_simpo_loss(
                    *inputs[:3], bias=inputs.bias, logits_budget_bytes=UNLIMITED
                )
            )
        assert peak <= chunk + small


@pytest.mark.emulation
def test_masked_rows_need_no_memory_for_logits() -> None:
    batch = make_linear_batch(pairs=2, time=40, vocabulary=8 * CHUNK, width=8)
    batch.labels[:, 11:] = -100  # At most 10 of 40 positions are scored.
    _, chunk, gradients, small = sizes(batch)
    leaf = batch.leaves()
    for budget in (0, UNLIMITED):
        count = int((batch.labels[:, 1:] >= 0).sum())

        def step(budget: int = budget, count: int = count) -> None:
            loss = linear_token_logps(
                *leaf[:3], bias=leaf.bias, logits_budget_bytes=budget, num_valid_tokens=count
            ).sum()
            loss.backward()

        held = 9 if budget else 1
        assert peak_bytes(step) <= gradients + 0.25 * held * chunk + small


@pytest.mark.emulation
def test_peak_bytes_sees_the_logits_of_the_eager_formula() -> None:
    batch = make_linear_batch(pairs=2, time=40, vocabulary=8 * CHUNK, width=8)
    logits, _, _, _ = sizes(batch)
    assert peak_bytes(lambda: dense_logps(*batch[:3], bias=batch.bias)) > logits


@pytest.mark.cpu_only
def test_a_label_out_of_range_fails_before_logits_are_computed() -> None:
    batch = make_linear_batch(pairs=2, time=40, vocabulary=8 * CHUNK, width=8)
    batch.labels[3, -1] = 8 * CHUNK
    _, chunk, _, _ = sizes(make_linear_batch(pairs=2, time=40, vocabulary=8 * CHUNK, width=8))

    def step() -> None:
        with pytest.raises(IndexError, match=r"labels\[3, 39\]"):
            linear_token_logps(*batch[:3], bias=batch.bias)

    assert peak_bytes(step) < 0.02 * chunk


# ---- random batches ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_batches_agree_with_the_oracle(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = 2 * pick(0, 1, 2, 3), pick(0, 1, 2, 6), pick(1, 2, 7, 16)
    vocabulary, dtype = pick(1, 2, 7, 64, 1025, 4096, 4097, 8200), pick(*DTYPES)
    sizes = shape, (vocabulary, shape[2]), (vocabulary,)
    values = [torch.from_numpy(rng.standard_normal(size)) for size in sizes]
    values[0] *= pick(0.0, 0.3, 1.0, 4.0)
    hidden, weight, offset = (x.to(dtype) for x in values)
    labels = torch.from_numpy(rng.integers(0, vocabulary, shape[:2]))
    labels[torch.from_numpy(rng.random(shape[:2])) < pick(0.0, 0.3, 0.9)] = -100
    batch = LinearBatch(hidden, weight, labels, pick(None, offset))
    options: dict[str, Any] = {
        "shift": pick(True, False), "logit_scale": pick(1.0, 0.7, 3.0),
        "softcap": pick(None, None, 30.0, 2.0), "beta": pick(0.1, 2.0),
        "sft_weight": pick(0.0, 0.3), "average_log_prob": pick(True, False),
        "empty": pick("drop", "nan"), "reduction": pick("mean", "sum", "none"),
        **pick({"loss_type": "hinge"}, {"label_smoothing": 0.2}, {}),
    }  # fmt: skip
    plan = {"logits_budget_bytes": pick(None, 0, 2**16, UNLIMITED),
            "num_valid_tokens": pick(None, labels.numel(), labels.numel() + 3)}  # fmt: skip

    leaf = batch.leaves()
    out = linear_simpo_loss(*leaf[:3], bias=leaf.bias, **options, **plan)
    grads = torch.autograd.grad(out.loss.sum(), leaf.inputs())
    want, want_grads = linear_oracle.linear_simpo_loss(
        *batch.doubles(), bias=batch.double_bias(), **options
    )
    # The logits are rounded to the dtype. The errors of its tokens add up to that of a sequence. A
    # loss multiplies the errors of both sides by beta, and adds them up.
    logits = linear_oracle.linear(*batch.doubles()[:2], batch.double_bias())
    largest = options["logit_scale"] * np.abs(logits).max(initial=0.0) + 8.0
    eps, beta = torch.finfo(dtype).eps, options["beta"]
    token = 2.0 * eps * largest
    sequence = token * (1 if options["average_log_prob"] else max(shape[1], 1))
    loss = (2.0 * beta + 1.0) * sequence * max(labels.numel(), 1)
    for name in ("loss", "losses", "chosen_logps", "rejected_logps", "sft_loss"):
        np.testing.assert_allclose(
            getattr(out, name).detach().numpy(), getattr(want, name),
            rtol=4.0 * eps, atol=sequence if "logps" in name else loss, err_msg=name,
        )  # fmt: skip
    # The slope of a token's gradient changes with the margin. Sums over tokens add up their errors.
    slope = options["logit_scale"] * (token * (beta + 1.0) + beta**2 * sequence)
    sums = [np.abs(weight.double().numpy()).max(initial=1.0),
            np.abs(hidden.double().numpy()).max(initial=1.0) * max(labels.numel(), 1),
            max(labels.numel(), 1)]  # fmt: skip
    for got, truth, factor in zip(grads, want_grads, sums, strict=False):
        np.testing.assert_allclose(
            got.double().numpy(), truth, rtol=4 * eps, atol=4.0 * slope * factor
        )
