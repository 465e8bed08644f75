"""The machine code of the installed library's CUDA kernels, for each of its architectures."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

import simpo_ext
from simpo_ext import _C

if TYPE_CHECKING:
    from bench.machine_code import Kernel

LIBRARY = Path(_C.__file__).parent / "lib" / "libsimpo_ext.so"

needs_cuda_build = pytest.mark.skipif(
    not simpo_ext.build_info()["cuda_runtime_version"], reason="built without nvcc"
)


@cache
def kernels_of_library(machine_code: ModuleType) -> list[Kernel]:
    return machine_code.kernels(LIBRARY)


@pytest.fixture
def machine_code(load) -> ModuleType:
    return load("machine_code")


@pytest.fixture
def compiled(machine_code: ModuleType) -> list[Kernel]:
    return kernels_of_library(machine_code)


def streaming(compiled: list[Kernel]) -> list[Kernel]:
    """The kernels that read or write [B, T, V]."""
    found = [k for k in compiled if "token_logps" in k.name]
    # For each dtype, transform of the logits and size of a row: forward, report and backward.
    assert len(found) == 4 * 2 * 2 * 3 * len({k.architecture for k in compiled})
    return found


def around_hidden_states(compiled: list[Kernel], *names: str) -> list[Kernel]:
    """The kernels around the products of hidden states, or those with the given names."""
    files = ("select_tokens_cu", "gather_rows_cu", "label_values_cu", "hidden_gradient_cu")
    found = [k for k in compiled if any(file in k.name for file in files)]
    # For each dtype: add_partial and hidden_gradient twice, both ways to gather rows and
    # put_label_gradients once. For each dtype of arithmetic: two kernels.
    assert len(found) == (4 * 7 + 2 * 2) * len({k.architecture for k in compiled})
    return [k for k in found if not names or any(name in k.name for name in names)]


# Kernels with 256 threads. The first two are for packed sequences, and have no dtype.
OF_SEQUENCES = (
    "fill_targets_kernel",
    "sequence_targets_kernel",
    "sequence_logps_kernel",
    "sequence_logps_backward_kernel",
    "sum_sequences_kernel",
    "preference_loss_backward_kernel",
)


def of_sequences(compiled: list[Kernel]) -> list[Kernel]:
    """The kernels with a block or more for each sequence."""
    files = ("sequence_targets_cu", "sequence_logps_cu", "preference_loss_cu")
    found = [k for k in compiled if any(file in k.name for file in files)]
    kernels = [k for k in found if any(name in k.name for name in OF_SEQUENCES)]
    # The targets once, and the others for each dtype of arithmetic, like score_pairs.
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
def test_the_library_contains_every_architecture_and_ptx(
    machine_code: ModuleType, compiled: list[Kernel]
) -> None:
    names = {
        arch: {k.name for k in compiled if k.architecture == arch}
        for arch in {k.architecture for k in compiled}
    }
    built_for = str(simpo_ext.build_info()["cuda_archs"]).split(",")
    assert set(names) == {f"sm_{arch.removesuffix('-real')}" for arch in built_for}
    # All architectures have the same kernels.
    assert len({frozenset(kernels) for kernels in names.values()}) == 1
    ptx = {f"sm_{arch}.ptx" for arch in built_for if not arch.endswith("-real")}
    listed = machine_code.cuobjdump("--list-ptx", LIBRARY)
    assert ptx
    assert all(name in listed for name in ptx)


@needs_cuda_build
def test_no_kernel_uses_local_memory(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        assert kernel.stack_bytes == 0, label(kernel)
        assert kernel.local_bytes == 0, label(kernel)
        assert not kernel.uses_local_memory(), label(kernel)


@needs_cuda_build
def test_streaming_kernels_leave_room_for_many_threads(compiled: list[Kernel]) -> None:
    # With 64 registers, 1024 threads fit on a multiprocessor. exp of a double needs more.
    for kernel in streaming(compiled):
        assert kernel.registers <= (128 if is_float64(kernel) else 64), label(kernel)


@needs_cuda_build
def test_main_loops_have_four_wide_loads_in_flight(
    machine_code: ModuleType, compiled: list[Kernel]
) -> None:
    # tanh, and exp of a double, take longer than memory accesses, so two loads suffice.
    for kernel in streaming(compiled):
        bodies = machine_code.loops(kernel.instructions)
        if not is_float64(kernel):  # Loops without an exp sum masked rows.
            bodies = [body for body in bodies if any(i.opcode == "MUFU.EX2" for i in body)]
        in_flight = max(map(machine_code.loads_in_flight, bodies))
        least = 2 if is_float64(kernel) or is_capped(kernel) else 4
        assert in_flight >= least, label(kernel)


@needs_cuda_build
def test_the_backward_loads_the_values_of_its_row_at_once(compiled: list[Kernel]) -> None:
    for kernel in streaming(compiled):
        if "backward" not in kernel.name:
            continue
        # The loads of the label, its gradient, max and sum_exp.
        loads = [i for i, each in enumerate(kernel.instructions) if each.name == "LDG"][:4]
        loaded: set[int] = set()
        for instruction in kernel.instructions[loads[0] : loads[-1] + 1]:
            assert instruction.name not in ("BRA", "EXIT"), label(kernel)
            registers = [int(n) for n in re.findall(r"\bR(\d+)", instruction.operands)]
            is_load = instruction.name == "LDG"
            assert not loaded & set(registers[1:] if is_load else registers), label(kernel)
            if is_load:
                loaded |= {registers[0], registers[0] + (".64" in instruction.opcode)}


@needs_cuda_build
def test_rows_of_hidden_states_have_four_wide_loads_in_flight(
    machine_code: ModuleType, compiled: list[Kernel]
) -> None:
    names = ("gather_rows_kernel", "add_partial_kernel", "hidden_gradient_kernel")
    for kernel in around_hidden_states(compiled, *names):
        assert kernel.registers <= 64, label(kernel)
        # A block of add_partial has one batch and no loop.
        bodies = (kernel.instructions, *machine_code.loops(kernel.instructions))
        assert max(map(machine_code.loads_in_flight, bodies)) >= 4, label(kernel)


@needs_cuda_build
def test_a_thousand_threads_can_select_tokens(compiled: list[Kernel]) -> None:
    for kernel in around_hidden_states(compiled, "select_tokens_kernel"):
        assert kernel.registers <= 64, label(kernel)


@needs_cuda_build
def test_the_kernels_of_shards_leave_room_for_many_threads(compiled: list[Kernel]) -> None:
    # Two kernels for each dtype, and one for each dtype of arithmetic.
    found = [k for k in compiled if "vocab_shards_cu" in k.name]
    assert len(found) == (4 * 2 + 2) * len({k.architecture for k in compiled})
    for kernel in found:
        # merge_shards processes four shards at a time, and has few blocks.
        limit = 64 if "merge_shards" in kernel.name else 40
        assert kernel.registers <= limit, label(kernel)


@needs_cuda_build
def test_blocks_of_four_sequences_fit_on_a_multiprocessor(compiled: list[Kernel]) -> None:
    for kernel in of_sequences(compiled):
        assert kernel.registers <= 64, label(kernel)


@needs_cuda_build
def test_no_kernel_uses_an_atomic(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        opcodes = {i.opcode.split(".")[0] for i in kernel.instructions}
        assert not opcodes & {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"}, label(kernel)


# Scaling the sum for a new maximum, and adding the batch's terms. A report has two more sums.
FLOAT64_PER_BATCH = {"forward": 2, "report": 8, "backward": 0}


@needs_cuda_build
def test_main_loops_use_float64_once_per_batch(load, compiled: list[Kernel]) -> None:
    loop_counts = load("loop_counts")
    for subject, counts in loop_counts.count_all(compiled).items():
        if subject.dtype != "float64":
            # A batch is at most four vectors; ptxas may have unrolled the loop once more.
            batches = max(1, counts.logits * loop_counts.ITEM_BYTES[subject.dtype] // 64)
            assert counts.fp64 <= FLOAT64_PER_BATCH[subject.pass_name] * batches, subject


@needs_cuda_build
def test_no_kernel_costs_more_per_logit_than_recorded(
    load, machine_code: ModuleType, compiled: list[Kernel]
) -> None:
    loop_counts = load("loop_counts")
    found, record = loop_counts.count_all(compiled), loop_counts.read_record()
    assert set(found) == set(loop_counts.all_subjects({k.architecture for k in compiled}))
    is_recorded_compiler = machine_code.compilers(LIBRARY) == {record.compiler}
    # The record may lack architectures of this build.
    said = [
        f"{subject.architecture} {subject.name}: {fault}"
        for subject in sorted(found.keys() & record.counts.keys())
        for fault in loop_counts.faults(
            found[subject], record.counts[subject], is_recorded_compiler
        )
    ]
    assert not said, "\n".join(said)


def test_the_record_is_complete_and_readme_has_its_table(load, tmp_path: Path) -> None:
    loop_counts, predicted = load("loop_counts"), load("predicted")
    record = loop_counts.read_record()
    architectures = {"sm_80", "sm_90", "sm_100", "sm_120"}  # those of CMakeLists.txt
    assert set(record.counts) == set(loop_counts.all_subjects(architectures))
    loop_counts.write_record(record, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == loop_counts.RECORD.read_text()
    readme = predicted.README.read_text(encoding="utf-8")
    assert predicted.table_in(readme) == predicted.make_table(record.counts)


def test_predictions_by_hand(load) -> None:
    loop_counts, predicted = load("loop_counts"), load("predicted")
    h200 = next(gpu for gpu in predicted.GPUS if gpu.name == "H200")
    # With 128 instructions per logit, each multiprocessor processes a logit per clock. These are
    # 132 * 1.755e9 logits of 2 bytes per second, 10.77 % of 4.3 TB/s.
    predict = partial(predicted.predict, bytes_per_logit=2, gpu=h200)
    counts = loop_counts.Counts(logits=4, issued=512, special=4, xu=4, alu=128, fp64=0)
    assert predict(counts) == ("issue slots", pytest.approx(1 / 0.10774, rel=1e-4))
    # 18 special functions per logit take 18 / 16 clocks. 80 instructions of the ALU take 80 / 64.
    busy = pytest.approx(1.125 / 0.10774, rel=1e-4)
    assert predict(replace(counts, xu=72)) == ("special functions", busy)
    assert predict(replace(counts, alu=320)) == ("ALU", pytest.approx(1.25 / 0.10774, rel=1e-4))
    # With one instruction per logit, memory is the limit.
    few = replace(counts, issued=4, alu=0, xu=0)
    assert predict(few)[1] == pytest.approx(1 / 128 / 0.10774, rel=1e-4)
    subject = loop_counts.Subject("sm_90", "forward", "bfloat16", False)
    assert "| 100 % (issue slots 7 %) |" in predicted.make_table({subject: few})
    assert "| 11 % (issue slots 928 %) |" in predicted.make_table({subject: counts})


# Faults that the checks above must find. The array is indexed by a value known only at run time, so
# it cannot be in registers. The second kernel uses each load before the next. The last kernels
# differ in products and special functions per logit: 1 and 1, 2 and 1, 0 and 2.
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

namespace planted {
struct ScaledLogits {};
template <int kProducts, int kSpecial>
__device__ float term(float x, float scale) {
  for (int i = 0; i < kProducts; ++i) x *= scale;
  for (int i = 0; i < kSpecial; ++i) asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
template <typename T, class Logits, int kProducts, int kSpecial, bool kReports>
__global__ void token_logps_kernel(const float4* in, float* out, float scale, int n) {
  float sum = 0;
  #pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float4 v = in[i];
    sum += term<kProducts, kSpecial>(v.x, scale) + term<kProducts, kSpecial>(v.y, scale) +
           term<kProducts, kSpecial>(v.z, scale) + term<kProducts, kSpecial>(v.w, scale);
  }
  out[threadIdx.x] = sum;
}
template __global__ void token_logps_kernel<float, ScaledLogits, 1, 1, false>(
    const float4*, float*, float, int);
template __global__ void token_logps_kernel<float, ScaledLogits, 2, 1, false>(
    const float4*, float*, float, int);
template __global__ void token_logps_kernel<float, ScaledLogits, 0, 2, false>(
    const float4*, float*, float, int);
}  // namespace planted
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("built without nvcc")
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.cu").write_text(FAULTY)
    command = ["nvcc", "-arch=sm_90", "-c", "faulty.cu", "-o", "faulty.o"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "faulty.o"


def test_the_checks_see_faulty_code(machine_code: ModuleType, faulty: Path) -> None:
    found = {kernel.name: kernel for kernel in machine_code.kernels(faulty)}
    spills = next(kernel for name, kernel in found.items() if "spills" in name)
    assert spills.stack_bytes > 0
    assert spills.uses_local_memory()
    one_by_one = next(kernel for name, kernel in found.items() if "one_by_one" in name)
    in_flight = map(machine_code.loads_in_flight, machine_code.loops(one_by_one.instructions))
    assert max(in_flight) == 1
    assert one_by_one.stack_bytes == 0
    counts = next(kernel for name, kernel in found.items() if "counts" in name)
    assert {i.opcode.split(".")[0] for i in counts.instructions} & {"ATOMG", "RED", "REDG"}


def test_the_record_sees_one_more_instruction_per_logit(
    load, machine_code: ModuleType, faulty: Path
) -> None:
    loop_counts = load("loop_counts")

    def counts_of(arguments: str):
        [kernel] = [k for k in machine_code.kernels(faulty) if arguments in k.name]
        [counts] = loop_counts.count_all([kernel]).values()
        return counts

    recorded = counts_of("Li1ELi1E")
    longer, more_special = counts_of("Li2ELi1E"), counts_of("Li0ELi2E")
    assert longer.issued_per_logit == recorded.issued_per_logit + 1
    assert more_special.issued_per_logit == recorded.issued_per_logit
    assert more_special.special_per_logit == 2 * recorded.special_per_logit == 2

    assert loop_counts.faults(recorded, recorded, True) == []
    [said] = loop_counts.faults(longer, recorded, True)
    assert said.endswith(f"instructions per logit, got {longer.issued_per_logit:.3f}")
    for is_recorded_compiler in (True, False):
        [said] = loop_counts.faults(more_special, recorded, is_recorded_compiler)
        assert said.endswith("special functions per logit, got 2.000")
    # An outdated record.
    [said] = loop_counts.faults(recorded, longer, True)
    assert said.endswith("record them again")
    assert loop_counts.faults(recorded, longer, False) == []


def test_the_command_reads_an_object_file(
    load, faulty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = load("predicted")
    assert predicted.main([str(faulty)]) == 0
    said = capsys.readouterr().out
    assert "| kernel | instructions, sm_90 | special | H200, predicted |" in said
    assert "| forward float32 |" in said
    before = load("loop_counts").RECORD.read_bytes()
    with pytest.raises(SystemExit, match="--record: expected every kernel, found no "):
        predicted.main([str(faulty), "--record"])
    assert load("loop_counts").RECORD.read_bytes() == before
