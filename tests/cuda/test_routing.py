"""The routing of CPU ops to the CUDA kernels, tested by routing them to the CPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from support.batches import make_batch
from support.cuda_routing import _routed, moved
from support.paths import ROOT

OPS = torch.ops.simpo_ext


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x[:, 1:],
        lambda x: x[1:, ::2],
        lambda x: x.t(),
        lambda x: x[::5, ::8],
        lambda x: x[:, :1].expand(6, 9),
        lambda x: x[:0],
        lambda x: x.flatten()[3],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_a_moved_tensor_has_its_values_strides_and_alignment(dtype: torch.dtype, make: Any) -> None:
    tensor: Tensor = make(torch.arange(54).reshape(6, 9).to(dtype))
    copy = moved(tensor, "cpu")
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert copy.dtype == tensor.dtype
    if tensor.numel():
        assert copy.data_ptr() % 16 == tensor.data_ptr() % 16
        assert copy.data_ptr() != tensor.data_ptr()


def test_pytest_starts_with_routed_ops() -> None:
    # Collecting tests needs no GPU.
    command = [sys.executable, "-m", "pytest", "--kernels=cuda", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "tests/loss/test_token_logps.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_values_are_at_least_as_exact_as_eager" in done.stdout


def test_routed_ops_return_and_overwrite_the_same_values() -> None:
    batch = make_batch()
    token = (-100, True, 1.0, 0.0)

    def run(name: str, *args: Any) -> Any:
        sent = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        routed = _routed(name, "cpu")(*sent)
        torch.testing.assert_close(routed, getattr(OPS, name)(*args), rtol=0, atol=0)
        for a, b in zip(sent, args, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        return routed

    logps, row_max, sum_exp = run("token_logps", *batch, *token)
    grad = torch.ones_like(logps)
    run("token_logps_backward", grad, *batch, row_max, sum_exp, *token)
    run("token_logps_backward_", grad, *batch, row_max, sum_exp, *token)
    hidden, weight, bias = (
        torch.randn(*batch.labels.shape, 3),
        torch.randn(9000, 3),
        torch.randn(9000),
    )
    linear = hidden, weight, bias, batch.labels
    _, row_max, sum_exp, kept = run("linear_token_logps", *linear, *token, 1 << 40, -1)
    saved = *linear, row_max, sum_exp, kept
    run("linear_token_logps_backward", grad, *saved, *token, True, True, True)
    part = (0, batch.logits.shape[2])
    stats = run("token_logps_shard", *batch, *part, *token)
    merged = run("token_logps_merge", stats[None], batch.labels, -100, True, False)
    run("token_logps_shard_backward", grad, *batch, *merged[1:], *part, *token)
    run("token_logps_shard_backward_", grad, *batch, *merged[1:], *part, *token)
    part = (0, 9000)
    stats, kept = run("linear_token_logps_shard", *linear, *part, *token, 1 << 40, 30)
    merged = run("linear_token_logps_merge", stats[None], batch.labels, -100, True, False)
    saved = *linear, *merged[1:], kept, *part
    rows, _, _ = run("linear_token_logps_shard_backward", grad, *saved, *token, True, True, True)
    run("linear_token_logps_dhidden", rows, hidden, batch.labels, -100, True)
    cu_seqlens = torch.tensor([0, 2, batch.labels.shape[1]])
    run("sequence_targets", batch.labels[:1], cu_seqlens, batch.logits.shape[2], -100, True)
    _, counts = run("sequence_logps", logps, batch.labels, None, -100, True, True)
    run("sequence_logps_backward", torch.ones(4), batch.labels, None, counts, -100, True, True)
    layout = (None, torch.tensor([[0, 3], [1, 3]]), torch.tensor([1.0, 0.5], dtype=torch.float64))
    options = (-100, True, True, 2.0, 0.5, 0, 0.0, 0.0, 0.1, 0, 1, 0)
    out = run("preference_loss", logps, batch.labels, *layout, *options)
    grads = (torch.ones(()), None, torch.ones(4), None)
    backward = (-100, True, True, 0.1, 0, 1, 0)
    run("preference_loss_backward", *grads, batch.labels, *layout, out[6], out[7], *backward)
