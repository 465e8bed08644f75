"""The C++ API: results and errors of a program, CPU kernels under sanitizers, failing builds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import simpo_ext
from simpo_ext import _C
from simpo_ext._ops.logits_plan import DEFAULT_LOGITS_BUDGET_BYTES, DEFAULT_LOGITS_BUDGET_SHARE
from support.batches import make_batch
from support.builds import (
    WITHOUT_DEBUG_INFO,
    build,
    needs_libtorch,
    run,
    skip_unless_sanitizer_works,
)
from support.paths import ROOT

CPP = ROOT / "tests" / "cpp"


# The same as in consumer/main.cpp.
OPTION_TABLE: list[dict[str, Any]] = [
    {},
    {"beta": 2.5, "gamma": 1.5, "label_smoothing": 0.1, "sft_weight": 0.25, "softcap": 20.0},
    {"gamma_beta_ratio": 0.1, "loss_type": "hinge", "reduction": "sum"},
    {"sft_weight": 0.5, "average_log_prob": False, "reduction": "none"},
    {"sft_weight": 0.5, "sft_reduction": "token", "shift": False},
    {"sft_weight": 0.5, "normalizer": 7.0},
    {"sft_weight": 0.5, "sft_reduction": "token", "normalizer": (7.0, 11.0)},
    {"empty": "nan", "ignore_index": 3, "logit_scale": 0.5},
]


# What consumer/main.cpp prints.
BUILD_INFO = (
    "version", "compiler", "cpu_capability", "torch_target", "cuda_archs", "cuda_runtime_version",
)  # fmt: skip

FLAT_TABLE: list[dict[str, Any]] = [
    {},
    {"gamma": 0.5, "alpha": 0.3, "sft_weight": 0.5, "sft_reduction": "token"},
    {"loss_type": "ipo", "reduction": "sum", "shift": False},
]


def flat_results(
    logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
    layout: dict[str, torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """The results of the function with this name in consumer/main.cpp."""
    results: list[torch.Tensor] = []

    def append(out: simpo_ext.SimPOOutput, leaf: torch.Tensor) -> None:
        out.loss.sum().backward()
        assert leaf.grad is not None
        results.extend([*tuple(out), leaf.grad])

    cu_seqlens = layout["cu_seqlens"]
    for options in FLAT_TABLE:
        shift = {"shift": options.get("shift", True)}
        z, x = logits.clone().requires_grad_(), hidden.clone().requires_grad_()
        append(simpo_ext.simpo_loss(z, labels, **layout, **options), z)
        append(simpo_ext.linear_simpo_loss(x, weight, labels, **layout, **options), x)
        logps = simpo_ext.token_logps(z, labels, cu_seqlens=cu_seqlens, **shift)
        leaf = logps.detach().requires_grad_()
        append(simpo_ext.simpo_loss_from_token_logps(leaf, labels, **layout, **options), leaf)
        results.append(simpo_ext.sequence_logps(logits, labels, cu_seqlens=cu_seqlens, **shift))
    return results


def sequence_results(
    logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
    layout: dict[str, torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """The results of the function with this name in consumer/main.cpp."""
    leaf = simpo_ext.sequence_logps(logits, labels).detach().requires_grad_()
    chosen, rejected = leaf.chunk(2)
    losses = simpo_ext.simpo_loss_from_logps(
        chosen,
        rejected.double(),
        pair_weight=torch.arange(1, len(chosen) + 1),
        beta=2.5,
        gamma=1.5,
        label_smoothing=0.1,
        alpha=0.3,
    )
    losses[0].sum().backward()
    assert leaf.grad is not None
    options: dict[str, Any] = {"ignore_index": 3}
    sequences = {name: layout[name] for name in ("cu_seqlens", "pairs")}
    counts = simpo_ext.count_pairs(labels, **options)
    assert counts.pairs < len(chosen)
    flat_counts = simpo_ext.count_pairs(labels.flatten(), **sequences, **options)
    normalizer = (counts.pairs, counts.tokens * 2)
    options |= {"sft_weight": 0.5, "sft_reduction": "token", "normalizer": normalizer}
    out = simpo_ext.linear_simpo_loss(hidden, weight, labels, **options)
    metrics = [torch.tensor(value, dtype=torch.float64) for value in out.metrics().values()]
    return [*losses, leaf.grad, *counts, *flat_counts, out.loss, out.sft_loss, *metrics]


@pytest.mark.cpu_only
@needs_libtorch
def test_a_program_gets_python_s_numbers_through_find_package(tmp_path: Path) -> None:
    prefixes = f"{torch.utils.cmake_prefix_path};{simpo_ext.cmake_prefix_path()}"
    prefix_path = f"-DCMAKE_PREFIX_PATH={prefixes}"
    build(CPP / "consumer", tmp_path / "build", *WITHOUT_DEBUG_INFO, prefix_path)
    # Labels without -100, so that each ignore_index of the table works. All labels of the first
    # sequence are 3, so the last option makes it empty.
    batch = make_batch(pairs=3, vocabulary=60)
    batch.labels[batch.labels == -100] = 3
    batch.labels[0] = 3
    vocabulary = batch.logits.shape[2]
    linear = [
        torch.randn(*batch.labels.shape, 5),
        torch.randn(vocabulary, 5),
        torch.randn(vocabulary),
    ]
    rows, time = batch.labels.shape
    layout = {  # the first position is in no sequence, and the second sequence is empty
        "cu_seqlens": torch.tensor([1, 7, 7, time, 3 * time, rows * time - 2], dtype=torch.int32),
        "pairs": torch.tensor([[0, 3], [4, 3], [2, 0], [1, 2]]),
        "pair_weight": torch.tensor([1.0, 0.5, 2.0, 3.0]),
    }
    torch.save([*batch, *linear, *layout.values()], tmp_path / "batch.pt")
    printed = run(tmp_path / "build" / "consumer", tmp_path / "batch.pt", tmp_path / "results.pt")
    info = simpo_ext.build_info()
    assert printed.splitlines() == [str(info[name]) for name in BUILD_INFO]

    expected: list[torch.Tensor] = []
    for options in OPTION_TABLE:
        leaf = batch.logits.clone().requires_grad_()
        out = simpo_ext.simpo_loss(leaf, batch.labels, **options)
        out.loss.sum().backward()
        expected += [*tuple(out), leaf.grad]
    for options in OPTION_TABLE:
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in linear)
        out = simpo_ext.linear_simpo_loss(
            hidden, weight, batch.labels, bias=bias, logits_budget_bytes=0, **options
        )
        out.loss.sum().backward()
        expected += [*tuple(out), hidden.grad, weight.grad, bias.grad]
    leaf = batch.logits.clone().requires_grad_()
    sequences = simpo_ext.sequence_logps(leaf, batch.labels, average_log_prob=False)
    sequences.sum().backward()
    expected += [sequences, leaf.grad]
    flat = (batch.logits.flatten(0, 1), linear[0].flatten(0, 1), linear[1], batch.labels.flatten())
    expected += flat_results(*flat, layout)
    expected += sequence_results(batch.logits, linear[0], linear[1], batch.labels, layout)
    # weights_only refuses the lists that C++ writes. This file is our own.
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0, equal_nan=True)


def test_the_header_has_python_s_default_budget() -> None:
    header = (ROOT / "csrc/include/simpo_ext/detail/budget.h").read_text()
    assert "kDefaultLogitsBudgetBytes = int64_t{1} << 30;" in header
    assert DEFAULT_LOGITS_BUDGET_BYTES == 1 << 30
    assert f"kDefaultLogitsBudgetShare = {DEFAULT_LOGITS_BUDGET_SHARE};" in header


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The kernels' test program under a sanitizer, built at its first use."""

    @cache
    def build_under(sanitizer: str) -> Path:
        folder = tmp_path_factory.mktemp(sanitizer)
        skip_unless_sanitizer_works(sanitizer, folder)
        build(CPP / "kernels", folder / "build", f"-DSANITIZER={sanitizer}")
        return folder / "build" / "kernels"

    return build_under


@pytest.mark.exhaustive
@pytest.mark.parametrize("level", _C.cpu_capabilities())
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_kernels_of_every_level_run_clean_under_a_sanitizer(
    kernels: Callable[[str], Path], sanitizer: str, level: str
) -> None:
    environment = os.environ | {"SIMPO_CPU_CAPABILITY": level}
    assert run(kernels(sanitizer), env=environment).split() == [level, "ok"]


def configuration_error(definitions: list[str], folder: Path) -> str:
    command = ["cmake", "-S", ROOT, "-B", folder, "-DSIMPO_PYTHON=OFF", *definitions]
    environment = {k: v for k, v in os.environ.items() if k != "CMAKE_PREFIX_PATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("-DSIMPO_CUDA=OFF", "torch's headers were not found"),
        ("-DSIMPO_TORCH_INCLUDE=/nonexistent", "SIMPO_TORCH_INCLUDE: expected a directory"),
        ("-DSIMPO_CUDA=maybe", "SIMPO_CUDA: expected AUTO, ON or OFF, got 'maybe'"),
    ],
)
def test_a_configuration_that_cannot_work_is_explained(
    definition: str, message: str, tmp_path: Path
) -> None:
    assert message in configuration_error([definition], tmp_path)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="built without nvcc")
def test_an_architecture_that_lacks_the_kernels_instructions_is_refused(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    definitions = [f"-DSIMPO_TORCH_INCLUDE={include}", "-DSIMPO_CUDA_ARCHS=90;75-real"]
    error = configuration_error(definitions, tmp_path)
    assert "SIMPO_CUDA_ARCHS: expected 80 or higher" in error
    assert "got '75-real'" in error
