"""dhidden on a GPU: the gradient of the hidden states, a sum over the chunks of the vocabulary.

cuBLAS adds each product to the sum without rounding it. If torch offers no cuBLAS, a kernel adds
products that were rounded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from simpo_ext import linear_token_logps
from support import linear_oracle
from support.batches import DTYPES
from support.linear_batches import (
    CHUNK,
    LinearBatch,
    logps_and_gradients,
    make_linear_batch,
    upstream_of,
)
from support.memory import allocated_bytes
from support.vocab_batches import linear_in_shards, token_options

pytestmark = [pytest.mark.kernels, pytest.mark.cuda_only, pytest.mark.emulation]

THREE = 2 * CHUNK + 100  # columns in three chunks; the last is narrower


class Calls(NamedTuple):
    """The number of calls that add a chunk's share of dhidden to the sum."""

    add_product: int
    add_partial: int


class EmulatedCublas:
    """Switches the emulated ops' cublasGemmEx on and off."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def set_available(self, is_available: bool) -> None:
        self._library.emulated_cublas(ctypes.c_bool(is_available))

    def calls_of(self, function: Callable[[], object]) -> Calls:
        self._take_calls()
        function()
        return self._take_calls()

    def _take_calls(self) -> Calls:
        counts = ctypes.c_int64(), ctypes.c_int64()
        self._library.take_emulated_calls(*map(ctypes.byref, counts))
        return Calls(*(count.value for count in counts))


@pytest.fixture
def cublas(request: pytest.FixtureRequest) -> Iterator[EmulatedCublas]:
    kernels = request.config.getoption("--kernels")
    folder = Path(request.config.cache.mkdir(f"{kernels}_ops"))
    emulated = EmulatedCublas(ctypes.CDLL(str(folder / "libemulated_ops.so")))
    yield emulated
    emulated.set_available(True)


def gradients(batch: LinearBatch) -> list[Tensor | None]:
    return logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=0)


def dhidden(batch: LinearBatch) -> Tensor:
    """dhidden with the strides of the batch's weight, which a clone might not keep."""
    hidden = batch.hidden.detach().requires_grad_()
    logps = linear_token_logps(
        hidden, batch.weight, batch.labels, bias=batch.bias, logits_budget_bytes=0
    )
    (gradient,) = torch.autograd.grad(logps, hidden, upstream_of(batch.labels).to(logps.dtype))
    return gradient


def error(batch: LinearBatch) -> float:
    """The relative error of dhidden in the Frobenius norm."""
    upstream = upstream_of(batch.labels).to(torch.promote_types(batch.hidden.dtype, torch.float32))
    bias = batch.double_bias()
    truth = linear_oracle.linear_token_logps_grad(
        upstream.double().numpy(), *batch.doubles(), bias=bias
    )
    want = torch.from_numpy(truth.hidden)
    return ((dhidden(batch).double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    ("vocabulary", "chunks"), [(50, 1), (CHUNK, 1), (CHUNK + 1, 2), (THREE, 3)]
)
def test_each_chunk_is_added_once(cublas: EmulatedCublas, vocabulary: int, chunks: int) -> None:
    batch = make_linear_batch(vocabulary=vocabulary, dtype=torch.bfloat16)
    # One chunk needs no sum. Without cuBLAS, the kernel that writes dhidden adds the last product.
    assert cublas.calls_of(lambda: gradients(batch)) == (chunks if chunks > 1 else 0, 0)
    cublas.set_available(False)
    assert cublas.calls_of(lambda: gradients(batch)) == (0, chunks - 1)


def test_each_chunk_of_a_shard_is_added_once(cublas: EmulatedCublas) -> None:
    batch = make_linear_batch(vocabulary=THREE, dtype=torch.bfloat16)
    upstream, cuts = upstream_of(batch.labels).float(), (0, CHUNK + 1, CHUNK + 1, THREE)

    def step() -> None:
        linear_in_shards(batch, upstream, token_options(), cuts)

    assert cublas.calls_of(step) == (4, 0)  # two chunks, none, and two
    cublas.set_available(False)
    assert cublas.calls_of(step) == (0, 4)


@pytest.mark.parametrize("needs", [(False, True, True), (False, False, True)])
def test_no_product_is_added_if_dhidden_is_not_requested(
    cublas: EmulatedCublas, needs: tuple[bool, bool, bool]
) -> None:
    batch = make_linear_batch(vocabulary=THREE)
    calls = cublas.calls_of(lambda: logps_and_gradients(linear_token_logps, batch, needs))
    assert calls == (0, 0)


def strided(weight: Tensor, layout: str) -> Tensor:
    """The weight with the layout of a view. Overlapping rows change its values."""
    vocabulary, width = weight.shape
    if layout == "columns":
        return weight.t().contiguous().t()
    if layout == "rows of a wider matrix":
        return weight.new_empty(vocabulary, width + 3)[:, 2:-1].copy_(weight)
    if layout == "columns of a taller matrix":
        return weight.new_empty(width, vocabulary + 3)[:, 2:-1].t().copy_(weight)
    if layout == "neither dimension":
        return weight.new_empty(vocabulary, width, 2)[:, :, 0].copy_(weight)
    if layout == "overlapping rows":
        return weight.flatten()[: vocabulary + width - 1].unfold(0, width, 1)
    return weight


LAYOUTS = [
    "columns", "rows of a wider matrix", "columns of a taller matrix", "neither dimension",
    "overlapping rows",
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(dtype, "rows") for dtype in DTYPES]
    + [(dtype, layout) for dtype in (torch.float64, torch.bfloat16) for layout in LAYOUTS],
)
def test_dhidden_is_as_exact_as_a_sum_of_rounded_products(
    cublas: EmulatedCublas, dtype: torch.dtype, layout: str
) -> None:
    batch = make_linear_batch(vocabulary=THREE, width=8, dtype=dtype)
    batch = batch._replace(weight=strided(batch.weight, layout))
    # New memory is filled with NaN, since the first product must not read the sum.
    torch.use_deterministic_algorithms(True)
    try:
        ours = error(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    cublas.set_available(False)
    rounded = error(batch)
    if dtype.itemsize == 2:
        assert ours <= rounded
    else:  # Neither way rounds products, but they sum in another order.
        assert ours <= 2 * rounded + torch.finfo(dtype).eps
    assert 0 < ours <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_a_single_row_or_column(cublas: EmulatedCublas, rows: int, width: int) -> None:
    # The last chunk has one column, so its stride is arbitrary.
    batch = make_linear_batch(vocabulary=2 * CHUNK + 1, width=width, dtype=torch.float64)
    batch.labels[:] = -100
    batch.labels[0, 1 : 1 + rows] = torch.arange(rows)
    assert error(batch) < 1e-14


def test_without_rows_dhidden_is_zero(cublas: EmulatedCublas) -> None:
    batch = make_linear_batch(vocabulary=THREE)
    batch.labels.fill_(-100)
    assert not dhidden(batch).any()


def test_cublas_needs_no_memory_for_products(cublas: EmulatedCublas) -> None:
    batch = make_linear_batch(vocabulary=THREE, width=64)
    leaf = batch.leaves((True, False, False))

    def allocated() -> int:
        """The bytes of all tensors that the backward allocates."""
        logps = linear_token_logps(*leaf[:3], bias=leaf.bias, logits_budget_bytes=0)
        return allocated_bytes(lambda: torch.autograd.grad(logps.sum(), leaf.hidden))

    inside = allocated()
    cublas.set_available(False)
    rows = int((batch.labels[:, 1:] != -100).sum())
    assert allocated() - inside == rows * 64 * 4
