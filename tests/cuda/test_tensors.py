"""CUDA tensors through the public API, on a GPU: autograd, graphs, streams, memory, devices.

The tests marked ``kernels`` test the kernels' results with --kernels=cuda.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simpo_ext
from support.batches import DTYPES, Batch, make_batch

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

OPTIONS: list[dict[str, Any]] = [
    {},
    {"sft_weight": 0.3, "sft_reduction": "token", "label_smoothing": 0.1},
    {"loss_type": "hinge", "reduction": "sum"},
    {"softcap": 20.0, "logit_scale": 0.5, "shift": False},
    {"inplace_backward": True},
]


def on_gpu(batch: Batch) -> Batch:
    return Batch(batch.logits.to(DEVICE), batch.labels.to(DEVICE))


def loss_and_grad(batch: Batch, **options: Any) -> tuple[simpo_ext.SimPOOutput, Tensor]:
    leaf = batch.logits.detach().clone().requires_grad_()
    out = simpo_ext.simpo_loss(leaf * 1, batch.labels, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out, grad


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch = make_batch(pairs=3, time=20, vocabulary=3001, dtype=dtype)
    want, want_grad = loss_and_grad(batch, **options)
    out, grad = loss_and_grad(on_gpu(batch), **options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, ours, theirs in zip(out._fields, tuple(out), tuple(want), strict=False):
        assert ours.device.type == DEVICE, name
        assert ours.dtype == theirs.dtype, name
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)
    assert out.metrics() == pytest.approx(want.metrics(), rel=tolerance, abs=tolerance)
    rounding = max(tolerance, torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0)
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_gradcheck_on_the_gpu(options: dict[str, Any]) -> None:
    batch = on_gpu(make_batch(pairs=1, time=4, vocabulary=7, dtype=torch.float64))
    logits = batch.logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: simpo_ext.simpo_loss(x, batch.labels, **options).loss, logits
    )


def test_opcheck_on_the_gpu() -> None:
    batch = on_gpu(make_batch())
    args = batch.logits.requires_grad_(), batch.labels, -100, True, 1.0, 0.0
    torch.library.opcheck(torch.ops.simpo_ext.token_logps.default, args)


def test_compiles_without_graph_break_on_the_gpu() -> None:
    batch = on_gpu(make_batch())
    compiled = torch.compile(
        lambda x: simpo_ext.simpo_loss(x, batch.labels, sft_weight=0.1).loss, fullgraph=True
    )
    leaf = batch.logits.clone().requires_grad_()
    loss = compiled(leaf)
    loss.backward()
    out, grad = loss_and_grad(batch, sft_weight=0.1)
    assert torch.equal(loss, out.loss)
    assert torch.equal(leaf.grad, grad)


def test_the_host_does_not_wait_for_the_gpu() -> None:
    batch = on_gpu(make_batch())
    leaf = batch.logits.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The mode is a prototype.
        try:
            torch.cuda.set_sync_debug_mode("error")
            simpo_ext.simpo_loss(leaf, batch.labels, sft_weight=0.1).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_captured_graph_replays_on_new_data(inplace: bool) -> None:
    def step(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        out = simpo_ext.simpo_loss(leaf * 1, labels, sft_weight=0.2, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        return out.loss.detach(), grad

    first = on_gpu(make_batch(pairs=3, time=33, vocabulary=5003, dtype=torch.bfloat16))
    static = Batch(first.logits.clone(), first.labels.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # A capture needs a warm-up on a side stream.
        step(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)

    for seed in (1, 2):
        batch = on_gpu(
            make_batch(pairs=3, time=33, vocabulary=5003, dtype=torch.bfloat16, seed=seed)
        )
        static.logits.copy_(batch.logits)
        static.labels.copy_(batch.labels)
        graph.replay()
        loss, grad = step(*batch)
        assert torch.equal(captured[0], loss)
        assert torch.equal(captured[1], grad)


@pytest.mark.parametrize("case", ["logits", "logits-inplace", "hidden"])
def test_the_first_call_of_a_process_may_be_captured(case: str) -> None:
    program = Path(__file__).with_name("first_call_in_capture.py")
    done = subprocess.run(
        [sys.executable, program, case], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_kernels_run_on_the_current_stream() -> None:
    batch = on_gpu(make_batch(time=40, vocabulary=5003))
    want, want_grad = loss_and_grad(batch)
    late = Batch(torch.full_like(batch.logits, torch.nan), batch.labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.logits.copy_(batch.logits)  # Other streams would read NaN.
        out, grad = loss_and_grad(late)
    stream.synchronize()
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(grad, want_grad)


# A row has two segments in bfloat16, and three in float32. Blocks share a row if there are 7 rows,
# but not if there are 700.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_do_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 700, 40_007, device=DEVICE).to(dtype)
    labels = torch.randint(40_007, (1, 700), device=DEVICE)
    labels[:, 3] = -100
    many = logits.detach().requires_grad_()
    few = logits[:, :7].clone().requires_grad_()
    logps = simpo_ext.token_logps(many, labels, shift=False)
    logps_of_few = simpo_ext.token_logps(few, labels[:, :7], shift=False)
    logps.sum().backward()
    logps_of_few.sum().backward()
    assert torch.equal(logps[:, :7], logps_of_few)
    assert torch.equal(many.grad[:, :7], few.grad)


def test_several_streams_at_once() -> None:
    batches = [
        on_gpu(make_batch(pairs=4, time=64, vocabulary=8001, seed=seed)) for seed in range(4)
    ]
    want = [loss_and_grad(batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results: list[Any] = [None] * len(batches)
    for _ in range(5):
        for i, (stream, batch) in enumerate(zip(streams, batches, strict=True)):
            with torch.cuda.stream(stream):
                results[i] = loss_and_grad(batch)
    torch.cuda.synchronize()
    for (out, grad), (want_out, want_grad) in zip(results, want, strict=True):
        assert torch.equal(out.loss, want_out.loss)
        assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory_is_one_gradient_or_none(inplace: bool) -> None:
    batch = on_gpu(make_batch(pairs=2, time=64, vocabulary=32768, dtype=torch.bfloat16))
    size = batch.logits.numel() * batch.logits.element_size()
    logits = batch.logits.requires_grad_() * 1
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # Torch could reuse a larger block.
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = simpo_ext.simpo_loss(logits, batch.labels, inplace_backward=inplace).loss
    assert torch.cuda.max_memory_allocated() - before < 0.02 * size
    (grad,) = torch.autograd.grad(loss, logits)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < (0.02 if inplace else 1.02) * size
    assert grad.shape == logits.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_repetition_changes_no_bit(dtype: torch.dtype) -> None:
    batch = on_gpu(make_batch(pairs=4, time=50, vocabulary=32003, dtype=dtype))
    first, first_grad = loss_and_grad(batch, sft_weight=0.3)
    for _ in range(3):
        out, grad = loss_and_grad(batch, sft_weight=0.3)
        assert all(torch.equal(a, b) for a, b in zip(tuple(out), tuple(first), strict=True))
        assert torch.equal(grad, first_grad)


def test_offsets_past_2_31_elements_on_the_gpu() -> None:
    T, V = 270, 2**22  # 2 * 270 * 4194304 elements, 4.2 GiB in bfloat16
    logits = torch.zeros(2, T, V, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.full((2, T), -100, device=DEVICE)
    for b, t, label in ((0, 3, 5), (1, 100, V - 1), (1, T - 1, 7)):
        labels[b, t] = label
        logits[b, t, label] = 20.0
    logps = simpo_ext.token_logps(logits.requires_grad_(), labels, shift=False)
    expected = -torch.log1p((V - 1) * torch.exp(torch.tensor(-20.0, dtype=torch.float64)))
    scored = labels != -100
    torch.testing.assert_close(
        logps[scored].double().cpu(), expected.expand(3), rtol=1e-5, atol=1e-8
    )
    assert not logps[~scored].any()
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert grad[scored].sum(dim=-1, dtype=torch.float64).abs().max() < 1e-3
    of_labels = grad[scored, labels[scored]].double().cpu()  # 1 - p
    torch.testing.assert_close(of_labels, -expected.expm1().expand(3), rtol=2.0**-8, atol=0.0)
    assert not grad[~scored].any()


def test_tensors_on_different_devices_are_refused() -> None:
    batch = on_gpu(make_batch())
    with pytest.raises(ValueError, match="labels: expected device cuda:0"):
        simpo_ext.simpo_loss(batch.logits, batch.labels.cpu())
    with pytest.raises(RuntimeError, match=r"expected a tensor on device cuda:0|same device"):
        torch.ops.simpo_ext.token_logps(batch.logits, batch.labels.cpu(), -100, True, 1.0, 0.0)


def test_a_label_out_of_range_gives_nan() -> None:
    batch = on_gpu(make_batch())
    batch.labels[1, 4] = 2**62
    out, grad = loss_and_grad(batch)
    assert out.loss.isnan()
    assert grad.isnan().any()
    torch.cuda.synchronize()


@pytest.mark.parametrize("index", range(1, max(2, torch.cuda.device_count())))
def test_a_tensor_on_another_gpu_than_the_current_one(index: int) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs a second GPU")
    device = torch.device(DEVICE, index)
    batch = make_batch()
    want, _ = loss_and_grad(on_gpu(batch))
    out, grad = loss_and_grad(Batch(batch.logits.to(device), batch.labels.to(device)))
    assert torch.cuda.current_device() == 0
    assert grad.device == device
    assert torch.equal(out.loss.cpu(), want.loss.cpu())
