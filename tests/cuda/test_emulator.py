"""The emulator of CUDA kernels finds faults.

Each program of emulation/faults.cpp is a tiny kernel with one planted fault or none.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from support.builds import run as run_command
from support.builds import skip_unless_sanitizer_works
from support.paths import EMULATION, ROOT

pytestmark = pytest.mark.emulation

SOURCE = EMULATION / "faults.cpp"

FLAGS = ["-std=c++20", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer", "-pthread"]
FLAGS += ["-I", str(EMULATION), "-I", str(ROOT / "csrc")]
# The emulator is compiled without -fsanitize=thread: TSan must not see the scheduler.
KERNEL_FLAGS = {
    "plain": ["-O2"],
    "ucontext": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread", "-fno-builtin-memcpy"],
}
EMULATOR_FLAGS = {
    **KERNEL_FLAGS,
    "ucontext": ["-O2", "-DSIMPO_EMULATION_UCONTEXT=1"],
    "tsan": ["-O1", "-DSIMPO_EMULATION_TSAN=1"],
}
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}

ASAN = pytest.param("asan", marks=pytest.mark.exhaustive)
TSAN = pytest.param("tsan", marks=pytest.mark.exhaustive)
UCONTEXT = pytest.param("ucontext", marks=pytest.mark.exhaustive)

Run = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of faults.cpp. Builds are cached."""

    @cache
    def build(checker: str) -> Path:
        folder = tmp_path_factory.mktemp(checker)
        if checker in SANITIZERS:
            skip_unless_sanitizer_works(SANITIZERS[checker], folder)
        flags = [*FLAGS, *EMULATOR_FLAGS[checker]]
        emulator = ("-c", EMULATION / "emulator.cpp", "-o", "emulator.o")
        run_command("c++", *flags, *emulator, cwd=folder)
        flags = [*FLAGS, *KERNEL_FLAGS[checker]]
        run_command("c++", *flags, SOURCE, "emulator.o", "-o", "faults", cwd=folder)
        return folder

    def run_program(checker: str, name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["./faults", name], cwd=build(checker), capture_output=True, text=True, check=False
        )

    return run_program


def places(fault: str) -> list[str]:
    """The lines of the fault in faults.cpp."""
    lines = SOURCE.read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if line.endswith(f"// fault: {fault}")]
    assert found, fault
    return [f"{SOURCE.name}:{line}" for line in found]


# Messages of faults that the emulator finds in every build.
MESSAGES = {
    "misaligned-vector": "misaligned access, 16 bytes at an address 4 above a multiple of 16",
    "misaligned-scalar": "misaligned access, 4 bytes at an address 2 above a multiple of 4",
    "divergent-barrier": "threads of one block wait at different barriers",
    "exit-before-barrier": "thread 7 of block (0, 0, 0) has exited; waiting for it",
    "exit-before-shuffle": "thread 7 of block (0, 0, 0) has exited; waiting for it",
    "deadlock": "deadlock: every thread waits",
    "divergent-shuffle": "lanes of one warp wait at different collectives",
    "wrong-mask": "mask 0xfffffffe, source lane 1: the calling lane is not in the mask",
    "different-masks": "lanes of one warp pass different masks",
    "absent-source-lane": "source lane 16: the lane it reads from is not in the mask",
    "non-uniform-load": "threads of one block load from different addresses",
}


@pytest.mark.parametrize("checker", ["plain", ASAN, TSAN])
@pytest.mark.parametrize("fault", MESSAGES)
def test_the_emulator_names_the_fault_the_thread_and_the_line(
    fault: str, checker: str, run: Run
) -> None:
    done = run(checker, fault)
    assert done.returncode != 0
    assert done.stderr.startswith("cuda emulation: ")
    assert MESSAGES[fault] in done.stderr
    assert re.search(r"thread \d+ of block \(0, 0, 0\) at \w+, ", done.stderr)
    for place in places(fault):
        assert place in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("out-of-bounds-scalar", "heap-buffer-overflow"),
        ("out-of-bounds-vector", "heap-buffer-overflow"),
        ("out-of-bounds-shared", "heap-buffer-overflow"),
        ("out-of-bounds-index", "index 32 out of bounds for type 'float [32]'"),
    ],
)
def test_an_access_out_of_bounds_is_reported_by_address_sanitizer(
    fault: str, message: str, run: Run
) -> None:
    done = run("asan", fault)
    assert done.returncode != 0
    assert message in done.stderr
    (place,) = places(fault)
    assert place in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "fault",
    [
        "missing-barrier",
        "missing-second-barrier",
        "missing-warp-sync",
        "warp-sync-for-barrier",
        "race-after-barrier",
        "race-after-collective",
        "race-between-blocks",
    ],
)
def test_a_race_is_reported_by_thread_sanitizer_with_both_lines(fault: str, run: Run) -> None:
    done = run("tsan", fault)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    for place in places(fault):
        assert place in done.stderr


@pytest.mark.parametrize(
    "fault",
    ["stale-shared-memory", "missing-barrier", "missing-warp-sync", "warp-sync-for-barrier"],
)
def test_reading_shared_memory_that_the_block_has_not_written_gives_nan(
    fault: str, run: Run
) -> None:
    assert re.match(r"sum -?nan", run("plain", fault).stdout)


@pytest.mark.parametrize("checker", ["plain", UCONTEXT, ASAN, TSAN])
@pytest.mark.parametrize(
    "program", ["reductions", "shuffles", "concurrent-launches", "refused-launches", "arithmetic"]
)
def test_kernels_without_a_fault_pass_every_checker(program: str, checker: str, run: Run) -> None:
    done = run(checker, program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# Not with TSan, since the kernel that records the order has races.
@pytest.mark.parametrize("checker", ["plain", ASAN])
def test_threads_and_blocks_run_in_the_order_that_was_chosen(checker: str, run: Run) -> None:
    done = run(checker, "schedules")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
