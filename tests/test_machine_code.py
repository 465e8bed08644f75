"""The machine code of the installed library's CUDA kernels, for every architecture in it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import simpo_ext
from machine_code import Kernel, cuobjdump, kernels, loads_in_flight, loops
from simpo_ext import _C

LIBRARY = Path(_C.__file__).parent / "lib" / "libsimpo_ext.so"

needs_cuda_build = pytest.mark.skipif(
    not simpo_ext.build_info()["cuda_runtime_version"], reason="built without nvcc"
)


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    return kernels(LIBRARY)


def streaming(compiled: list[Kernel]) -> list[Kernel]:
    """The kernels that read or write [B, T, V]."""
    found = [k for k in compiled if "token_logps" in k.name]
    # For each dtype, transform of the logits and size of a row: forward, report and backward.
    assert len(found) == 4 * 2 * 2 * 3 * len({k.architecture for k in compiled})
    return found


def around_hidden_states(compiled: list[Kernel], *names: str) -> list[Kernel]:
    """Those of token_rows.cu, or of the names given."""
    found = [k for k in compiled if "token_rows_cu" in k.name]
    # add_partial and hidden_gradient twice for each dtype, both ways to gather rows and
    # put_label_gradients once, and two kernels for each dtype of arithmetic alone.
    assert len(found) == (4 * 7 + 2 * 2) * len({k.architecture for k in compiled})
    return [k for k in found if not names or any(name in k.name for name in names)]


# Of 256 threads. The first two are of the flat layout, and know no dtype.
OF_SEQUENCES = (
    "fill_targets_kernel",
    "sequence_targets_kernel",
    "sequence_logps_kernel",
    "sequence_logps_backward_kernel",
    "sum_sequences_kernel",
    "preference_loss_backward_kernel",
)


def of_sequences(compiled: list[Kernel]) -> list[Kernel]:
    """Those that are a block or more for each sequence."""
    files = ("sequence_targets_cu", "sequence_logps_cu", "preference_loss_cu")
    found = [k for k in compiled if any(file in k.name for file in files)]
    kernels = [k for k in found if any(name in k.name for name in OF_SEQUENCES)]
    # The targets once, the others for each dtype of arithmetic; and beside them score_pairs.
    architectures = len({k.architecture for k in compiled})
    assert len(kernels) == (2 + 4 * 2) * architectures
    assert len(found) == len(kernels) + 2 * architectures
    return kernels


def is_float64(kernel: Kernel) -> bool:
    return "kernelId" in kernel.name


def is_capped(kernel: Kernel) -> bool:
    return "CappedLogits" in kernel.name


def label(kernel: Kernel) -> str:
    return f"{kernel.architecture} {kernel.name}"


@needs_cuda_build
def test_the_library_carries_every_architecture_and_ptx_for_later_ones(
    compiled: list[Kernel],
) -> None:
    names = {
        arch: {k.name for k in compiled if k.architecture == arch}
        for arch in {k.architecture for k in compiled}
    }
    built_for = str(simpo_ext.build_info()["cuda_archs"]).split(",")
    assert set(names) == {f"sm_{arch.removesuffix('-real')}" for arch in built_for}
    # The same kernels for each.
    assert len({frozenset(kernels) for kernels in names.values()}) == 1
    ptx = {f"sm_{arch}.ptx" for arch in built_for if not arch.endswith("-real")}
    listed = cuobjdump("--list-ptx", LIBRARY)
    assert ptx
    assert all(name in listed for name in ptx)


@needs_cuda_build
def test_no_kernel_spills_or_touches_local_memory(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        assert kernel.stack_bytes == 0, label(kernel)
        assert kernel.local_bytes == 0, label(kernel)
        assert not kernel.uses_local_memory(), label(kernel)


@needs_cuda_build
def test_streaming_kernels_leave_room_for_many_threads(compiled: list[Kernel]) -> None:
    # 64 registers: 1024 threads on a multiprocessor. exp of a double takes more.
    for kernel in streaming(compiled):
        assert kernel.registers <= (128 if is_float64(kernel) else 64), label(kernel)


@needs_cuda_build
def test_main_loops_have_four_wide_loads_in_flight(compiled: list[Kernel]) -> None:
    # tanh and exp of a double take longer than memory does, and two loads suffice.
    for kernel in streaming(compiled):
        bodies = loops(kernel.instructions)
        if not is_float64(kernel):  # not those without an exp, as the sum of a masked row has
            bodies = [body for body in bodies if any(i.opcode == "MUFU.EX2" for i in body)]
        in_flight = max(map(loads_in_flight, bodies))
        least = 2 if is_float64(kernel) or is_capped(kernel) else 4
        assert in_flight >= least, label(kernel)


@needs_cuda_build
def test_rows_of_hidden_states_have_four_wide_loads_in_flight(compiled: list[Kernel]) -> None:
    names = ("gather_rows_kernel", "add_partial_kernel", "hidden_gradient_kernel")
    for kernel in around_hidden_states(compiled, *names):
        assert kernel.registers <= 64, label(kernel)
        # add_partial is one batch for each block, without a loop.
        bodies = (kernel.instructions, *loops(kernel.instructions))
        assert max(map(loads_in_flight, bodies)) >= 4, label(kernel)


@needs_cuda_build
def test_a_thousand_threads_can_select_tokens(compiled: list[Kernel]) -> None:
    for kernel in around_hidden_states(compiled, "select_tokens_kernel"):
        assert kernel.registers <= 64, label(kernel)


@needs_cuda_build
def test_the_kernels_of_shards_leave_room_for_many_threads(compiled: list[Kernel]) -> None:
    # Two kernels for each dtype, and one for each dtype of arithmetic alone.
    found = [k for k in compiled if "vocab_shards_cu" in k.name]
    assert len(found) == (4 * 2 + 2) * len({k.architecture for k in compiled})
    for kernel in found:
        assert kernel.registers <= 40, label(kernel)


@needs_cuda_build
def test_four_sequences_at_a_time_fit_on_a_multiprocessor(compiled: list[Kernel]) -> None:
    for kernel in of_sequences(compiled):
        assert kernel.registers <= 64, label(kernel)


@needs_cuda_build
def test_no_kernel_uses_an_atomic(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        opcodes = {i.opcode.split(".")[0] for i in kernel.instructions}
        assert not opcodes & {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"}, label(kernel)


# What the checks above are there to find. The array is indexed by a value known only at run time,
# so that it cannot live in registers; the second kernel uses each load before the next.
FAULTY = """
__global__ void spills(const float* in, const int* at, float* out, int n) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[i] = in[i * n + threadIdx.x];
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += values[at[i] & 31] * values[at[i + n] & 31];
  out[threadIdx.x] = sum;
}
__global__ void loads_one_by_one(const uint4* in, uint4* out, int n) {
  #pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const uint4 v = in[i];
    out[i] = make_uint4(v.x + 1, v.y + 2, v.z + 3, v.w + 4);
  }
}
__global__ void counts(int* out) { atomicAdd(out, 1); }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="built without nvcc")
def test_the_checks_see_faulty_code(tmp_path: Path) -> None:
    (tmp_path / "faulty.cu").write_text(FAULTY)
    command = ["nvcc", "-arch=sm_90", "-c", "faulty.cu", "-o", "faulty.o"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = {kernel.name: kernel for kernel in kernels(tmp_path / "faulty.o")}
    spills = next(kernel for name, kernel in found.items() if "spills" in name)
    assert spills.stack_bytes > 0
    assert spills.uses_local_memory()
    one_by_one = next(kernel for name, kernel in found.items() if "one_by_one" in name)
    assert max(map(loads_in_flight, loops(one_by_one.instructions))) == 1
    assert one_by_one.stack_bytes == 0
    counts = next(kernel for name, kernel in found.items() if "counts" in name)
    assert {i.opcode.split(".")[0] for i in counts.instructions} & {"ATOMG", "RED", "REDG"}
