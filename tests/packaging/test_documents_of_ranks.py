"""The examples for several processes run as printed, in two processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from support.distributed_training import whole
from support.documents import code
from support.ranks import run_on_ranks

pytestmark = pytest.mark.cpu_only

DOCUMENT = "simpo_ext/distributed/README.md"


def run_examples(sources: list[str]) -> dict[str, float]:
    """Runs the examples, and returns the norms of all gradients."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, DOCUMENT, "exec"), names)
    leaves: dict[str, Tensor] = {}
    for name, value in names.items():
        if isinstance(value, torch.nn.Module):
            leaves |= {f"{name}.{key}": leaf for key, leaf in value.named_parameters()}
        elif isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
            leaves[name] = value
    return {name: whole(leaf.grad).norm().item() for name, leaf in leaves.items()}


def test_the_examples_run_on_two_ranks() -> None:
    sources = code(DOCUMENT)
    assert len(sources) >= 5
    for norms in run_on_ranks(2, run_examples, sources):
        modules = {name.split(".")[0] for name in norms}
        assert {"model", "ddp", "sharded", "hidden", "weight", "logits"} <= modules
        for name, norm in norms.items():
            assert math.isfinite(norm) and norm > 0.0, name
