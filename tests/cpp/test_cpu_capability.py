"""The CPU kernels of each instruction set, and the memory of their large gradients."""

from __future__ import annotations

import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import simpo_ext
from simpo_ext import _C
from support.batches import DTYPES, make_batch
from support.builds import build_library, run

# Only the choice of an instruction set and memory are tested here. Other tests check the results.
pytestmark = pytest.mark.cpu_only

VARIABLE = "SIMPO_CPU_CAPABILITY"
LEVELS = _C.cpu_capabilities()
TORCH = torch.utils.cmake_prefix_path


# ---- which level is chosen ----------------------------------------------------------------------


def python(code: str, *arguments: str | Path, level: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if level is not None:
        environment[VARIABLE] = level
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def capability_with(level: str | None) -> str:
    done = python("import simpo_ext; print(simpo_ext.cpu_capability())", level=level)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# No override, an empty one, and the least capable level.
@pytest.mark.parametrize(
    ("override", "expected"),
    [(None, LEVELS[-1]), ("", LEVELS[-1]), ("DeFault", "DEFAULT")],
)
@pytest.mark.skipif(LEVELS[0] != "DEFAULT", reason="not x86-64")
def test_the_most_capable_level_is_chosen_unless_a_name_in_any_case_says_otherwise(
    override: str | None, expected: str
) -> None:
    assert capability_with(override) == expected


# neon belongs to another architecture. A name with a blank is not valid, either.
@pytest.mark.parametrize("override", ["neon512", "avx2 "])
def test_an_unknown_level_is_refused_with_the_choices(override: str) -> None:
    done = python("import simpo_ext", level=override)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ValueError: {VARIABLE}: ")
    assert ", ".join(LEVELS) in message
    assert f"got '{override}'" in message


REALISTIC_BATCH = """
import sys, torch, simpo_ext
batches, path = torch.load(sys.argv[1]), sys.argv[2]
results = {}
for name, (logits, labels) in batches.items():
    for options in ({}, {"softcap": 20.0, "logit_scale": 0.5}):
        leaf = logits.clone().requires_grad_()
        out = simpo_ext.simpo_loss(leaf, labels, sft_weight=0.5, **options)
        out.loss.backward()
        logps = simpo_ext.token_logps(logits, labels, **options)
        results[name, bool(options)] = (out.loss.detach(), logps, leaf.grad)
torch.save(results, path)
print(simpo_ext.cpu_capability())
"""


def test_the_levels_agree_to_rounding(tmp_path: Path) -> None:
    # 32003: a model's vocabulary, and odd. Two pairs, prompts and padding masked.
    batches = {
        str(dtype): tuple(make_batch(time=12, vocabulary=32003, dtype=dtype)) for dtype in DTYPES
    }
    torch.save(batches, tmp_path / "batches.pt")
    results = {}
    for level in LEVELS:
        path = tmp_path / f"{level}.pt"
        # Lower-case, as documented.
        done = python(REALISTIC_BATCH, tmp_path / "batches.pt", path, level=level.lower())
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == level
        results[level] = torch.load(path)
    for level in LEVELS[1:]:
        for (name, is_capped), (loss, logps, gradient) in results[level].items():
            ours, theirs = (loss, logps, gradient), results[LEVELS[0]][name, is_capped]
            is_double = logps.dtype == torch.float64
            # Log-probs of up to 16: an ulp of them, and a few of the sum. Results that are rounded
            # to 2 bytes may be rounded in different directions.
            for a, b in zip(ours[:2], theirs[:2], strict=True):
                tolerance = 1e-14 if is_double else 3e-6
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
            rtol = 1e-13 if is_double else 2e-6
            if gradient.element_size() == 2:
                rtol = torch.finfo(gradient.dtype).eps
            tiny = torch.finfo(gradient.dtype).tiny
            torch.testing.assert_close(gradient, theirs[2], rtol=rtol, atol=2e-9 + 2 * tiny)


def test_no_object_leaves_code_for_others_that_do_not_have_its_instructions(
    tmp_path: Path,
) -> None:
    # If several objects define an inline function, the linker keeps one copy for all of them. If
    # that were the one for AVX-512, the other levels would run it, too. Each level has its own
    # namespace, so that the linker cannot mix them up.
    definitions = ("-DSIMPO_PYTHON=OFF", "-DSIMPO_CUDA=OFF", f"-DCMAKE_PREFIX_PATH={TORCH}")
    build_library(tmp_path, *definitions, target="kernels")
    objects = list(tmp_path.rglob("row_kernels_*.o"))
    assert objects
    tables = set()
    for path in objects:
        isa = re.match(r"row_kernels_(\w+)\.cpp\.o", path.name)[1]
        printed = run("nm", "-C", "--defined-only", "--extern-only", path)
        for line in printed.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVuwv":
                assert f"simpo_ext::cpu::{isa}::" in name, (path.name, line)
            else:
                tables.add(name)
                assert re.fullmatch(r"simpo_ext::cpu::k\w+RowKernels", name), (path.name, line)
    assert len(tables) == len(objects)


# ---- memory of large gradients ------------------------------------------------------------------

MIB = 2**20
# kLargeBytes in csrc/cpu/pages.h.
LARGE = 32 * MIB


def resident() -> int:
    """Bytes of memory that this process takes up."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)


def large_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits a few MiB larger than LARGE, in smaller sequences, with masked prompts and padding."""
    vocabulary = 60001 if dtype == torch.float32 else 120001
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(4, 40, vocabulary, generator=generator) * 3).to(dtype)
    labels = torch.randint(vocabulary, (4, 40), generator=generator)
    labels[:, :13] = -100
    labels[1, 30:] = -100
    labels[3] = -100  # a sequence without a valid token
    assert LARGE < logits.nbytes < 2 * LARGE
    return logits, labels


def gradient_of(logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    logps = simpo_ext.token_logps(leaf, labels)
    return torch.autograd.grad(logps.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_gradient_is_that_of_its_sequences(dtype: torch.dtype) -> None:
    logits, labels = large_batch(dtype)
    gradient = gradient_of(logits, labels)
    assert gradient.is_contiguous()
    assert gradient.shape == logits.shape and gradient.dtype == dtype
    assert gradient.device == logits.device and not gradient.requires_grad
    for row in range(len(logits)):
        alone = gradient_of(logits[row : row + 1], labels[row : row + 1])
        assert alone.nbytes < LARGE
        assert torch.equal(gradient[row : row + 1].view(torch.uint8), alone.view(torch.uint8))
    valid = torch.zeros(labels.shape, dtype=torch.bool)
    valid[:, :-1] = labels[:, 1:] != -100
    assert (gradient[~valid].view(torch.uint8) == 0).all()
    assert (gradient[valid] != 0).any(-1).all()


def test_a_large_gradient_of_logits_with_gaps_is_contiguous() -> None:
    logits, labels = large_batch()
    room = torch.full((4, 41, logits.shape[2]), float("nan"))
    room[:, 1:] = logits
    gradient = gradient_of(room[:, 1:], labels)
    assert gradient.is_contiguous()
    assert torch.equal(gradient, gradient_of(logits, labels))


@needs_proc
def test_masked_positions_of_a_large_gradient_take_no_memory_and_none_is_kept() -> None:
    # 64 MiB, of which 8 consecutive rows of 1 MiB are valid.
    logits = torch.randn(1, 64, MIB // 4, generator=torch.Generator().manual_seed(5))
    labels = torch.full((1, 64), -100)
    labels[0, 21:29] = 7
    gradient_of(logits, labels)  # the first call also sets things up
    before = resident()
    gradient = gradient_of(logits, labels)
    taken = resident() - before
    # Huge pages round the valid region to 2 MiB at both ends, and 2 MiB are for the rest of the
    # process.
    assert 8 * MIB - 2 * MIB <= taken <= (8 + 4 + 2) * MIB
    # Reading maps the shared page of zeros, or huge ones if the system has them.
    assert gradient[0, 40].count_nonzero() == 0
    del gradient
    assert resident() - before <= 2 * MIB


@needs_proc
def test_many_large_gradients_one_after_another_leave_nothing_behind() -> None:
    logits, labels = large_batch()
    gradient_of(logits, labels)
    before = resident()
    for _ in range(5):
        gradient_of(logits, labels)
    assert resident() - before <= 4 * MIB


def test_a_large_gradient_is_a_tensor_like_any_other() -> None:
    logits, labels = large_batch()
    gradient = gradient_of(logits, labels)
    expected = torch.empty_like(gradient).copy_(gradient)
    assert torch.equal(gradient.clone(), expected)
    array = gradient.numpy()
    assert array.flags.c_contiguous and array.flags.writeable
    view = gradient[1:, 5:]
    del gradient  # the view and the array still keep the memory
    assert torch.equal(view, expected[1:, 5:])
    view += view
    assert torch.equal(torch.from_numpy(array)[1:, 5:], expected[1:, 5:] * 2)
    view.zero_()  # including the rows that no kernel wrote
    view[2] = 1.0
    assert array[3, 5:].min() == 1.0 and array[1:3, 5:].max() == 0.0


def test_large_gradients_accumulate_in_grad() -> None:
    logits, labels = large_batch()
    expected = gradient_of(logits, labels)
    leaf = logits.clone().requires_grad_()
    for count in (1, 2):
        simpo_ext.token_logps(leaf, labels).sum().backward()
        assert torch.equal(leaf.grad, expected * count)
    leaf.grad.zero_()
    simpo_ext.token_logps(leaf, labels).sum().backward()
    assert torch.equal(leaf.grad, expected)


def test_a_large_gradient_can_be_shared_with_another_process() -> None:
    logits, labels = large_batch()
    gradient = gradient_of(logits, labels)
    if shutil.disk_usage("/dev/shm").free < 2 * gradient.nbytes:
        pytest.skip("needs room in /dev/shm")
    expected = gradient.clone()
    shared = gradient.share_memory_()
    assert shared.is_shared() and torch.equal(shared, expected)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=operator.setitem, args=(shared, 3, 2.5)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (shared[3] == 2.5).all() and torch.equal(shared[:3], expected[:3])
