"""csrc/examples with an installed wheel and a plain CMake install, compared with Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import simpo_ext
from simpo_ext import _C
from support.builds import WITHOUT_DEBUG_INFO, build, build_library, needs_libtorch, run
from support.paths import CSRC, ROOT

EXAMPLE = ROOT / "csrc" / "examples" / "linear_head"
PACKAGE = Path(_C.__file__).parent
TORCH = torch.utils.cmake_prefix_path
STEPS = 8

Programs = Callable[[str], Path]

pytestmark = needs_libtorch


@pytest.fixture(scope="module")
def plain_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of an install without Python, moved to another folder after the install."""
    folder = tmp_path_factory.mktemp("plain")
    build_library(
        folder / "build",
        "-DSIMPO_PYTHON=OFF",
        "-DSIMPO_CUDA=OFF",
        f"-DCMAKE_PREFIX_PATH={TORCH}",
        f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}",
    )
    run("cmake", "--install", folder / "build")
    shutil.rmtree(folder / "build")
    return (folder / "installed").rename(folder / "moved")


@pytest.fixture(scope="module")
def program_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Programs:
    """The example, built with one of the two installs at its first use."""

    @cache
    def build_against(install: str) -> Path:
        folder = tmp_path_factory.mktemp("example")
        prefix = (
            simpo_ext.cmake_prefix_path()
            if install == "wheel"
            else request.getfixturevalue("plain_install")
        )
        prefix_path = f"-DCMAKE_PREFIX_PATH={TORCH};{prefix}"
        build(EXAMPLE, folder, *WITHOUT_DEBUG_INFO, prefix_path)
        return folder / "linear_head"

    return build_against


# The plain install compiles the library once more.
@pytest.fixture(params=["wheel", pytest.param("plain install", marks=pytest.mark.exhaustive)])
def program(request: pytest.FixtureRequest, program_of: Programs) -> Path:
    """The example, built with each of the two installs."""
    return program_of(request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose shapes differ from the example's own data."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 20, 24, generator=generator)
    labels = torch.randint(90, (6, 20), generator=generator)
    labels[:, :5] = -100
    weight = 0.1 * torch.randn(90, 24, generator=generator)
    path = tmp_path_factory.mktemp("data") / "data.pt"
    torch.save([hidden, labels, weight], path)
    return path


def trained_in_python(path: Path, flags: list[str]) -> list[tuple[float, float, float]]:
    """Loss, accuracy and margin of each step of the example's training."""
    hidden, labels, weight = torch.load(path, weights_only=True)
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight.data.copy_(weight)
    if "--sgd" in flags:
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.005)
    options = {"beta": 2.0, "gamma_beta_ratio": 0.5, "sft_weight": 0.1}
    lines = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        if "--logits" in flags:
            out = simpo_ext.simpo_loss(head(hidden), labels, **options)
        else:
            out = simpo_ext.linear_simpo_loss(hidden, head.weight, labels, **options)
        out.loss.backward()
        optimizer.step()
        metrics = out.metrics()
        accuracy, margin = metrics["rewards/accuracies"], metrics["rewards/margins"]
        lines.append((out.loss.item(), accuracy, margin))
    return lines


def line(step: int, loss: float, accuracy: float, margin: float) -> str:
    return f"step {step}  loss {loss:.9g}  accuracy {accuracy:.3f}  margin {margin:.9g}"


# With SGD, Python and C++ do the same operations. Nine digits determine every bit of a float32.
@pytest.mark.cpu_only
@pytest.mark.parametrize("flags", [["--sgd"], ["--sgd", "--logits"]])
def test_training_with_sgd_prints_python_s_very_numbers(
    program: Path, data: Path, flags: list[str]
) -> None:
    printed = run(program, "--data", data, "--steps", str(STEPS), *flags).splitlines()
    expected = trained_in_python(data, flags)
    assert printed == [line(step, *numbers) for step, numbers in enumerate(expected)]
    assert expected[-1][0] < 0.5 * expected[0][0]


# With AdamW, Python updates its averages in one operation (lerp) and C++ in two. The results differ
# by about one rounding of each parameter in each step.
@pytest.mark.cpu_only
def test_training_with_adamw_prints_python_s_numbers_but_for_roundings(
    program: Path, data: Path
) -> None:
    printed = run(program, "--data", data, "--steps", str(STEPS)).splitlines()
    expected = trained_in_python(data, [])
    assert printed[0] == line(0, *expected[0])
    numbers = [re.findall(r"(?:loss|margin) (\S+)", row) for row in printed]
    torch.testing.assert_close(
        torch.tensor([[float(loss), float(margin)] for loss, margin in numbers]),
        torch.tensor([[loss, margin] for loss, _, margin in expected]),
        rtol=1e-5,
        atol=0,
    )
    assert expected[-1][0] < 0.5 * expected[0][0]


def test_training_on_data_of_its_own_lowers_the_loss(program: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run(program))]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]


def failure(program: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 1, done
    return done.stderr


def test_errors_end_the_program_with_their_message(program: Path, tmp_path: Path) -> None:
    assert "expected [--steps N]" in failure(program, "--help")
    torch.save([torch.zeros(3, 4, 2), torch.zeros(3, 4).long(), torch.zeros(5, 2)], tmp_path / "a")
    assert "hidden: expected an even B" in failure(program, "--data", str(tmp_path / "a"))
    assert "SIMPO_CPU_CAPABILITY: expected one of" in failure(program, SIMPO_CPU_CAPABILITY="486")


@pytest.mark.exhaustive
def test_an_install_has_no_path_of_the_machine_that_built_it(plain_install: Path) -> None:
    files = [path for path in plain_install.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".so", ".h", ".cmake"}
    assert not list(plain_install.rglob("libtorch*"))
    places = (plain_install.parent, ROOT, Path(torch.__file__).parent)
    for file in files + [path for path in PACKAGE.rglob("*") if path.suffix in (".h", ".cmake")]:
        content = file.read_bytes()
        assert not [place for place in places if os.fsencode(place) in content], file


@pytest.mark.exhaustive
def test_the_cmake_package_says_what_the_library_has(plain_install: Path) -> None:
    info = simpo_ext.build_info()
    has_cuda = {PACKAGE: bool(info["cuda_runtime_version"]), plain_install: False}
    for folder, with_cuda in has_cuda.items():
        text = next(folder.rglob("simpo_extConfig.cmake")).read_text()
        assert f"set(simpo_ext_WITH_CUDA {'ON' if with_cuda else 'OFF'})" in text
        assert f'set(simpo_ext_TORCH_TARGET "{info["torch_target"]}")' in text


def library_in(folder: Path) -> Path:
    return next(folder.rglob("libsimpo_ext.so"))


@pytest.mark.exhaustive
def test_two_copies_in_one_process_leave_the_first_at_work_and_the_second_with_a_message(
    plain_install: Path,
) -> None:
    first, second = PACKAGE / "lib" / "libsimpo_ext.so", library_in(plain_install)
    code = f"""
import ctypes, simpo_ext, torch
for path in ({str(first)!r}, {str(second)!r}):
    error = ctypes.CDLL(path).simpo_ext_load_error
    error.restype = ctypes.c_char_p
    print((error() or b"none").decode())
print(simpo_ext.token_logps(torch.zeros(1, 1, 4), torch.zeros(1, 1).long(), shift=False).item())
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    of_first, of_second, logp = printed.stdout.splitlines()
    assert of_first == "none"
    assert of_second == (
        f"expected one copy of simpo_ext's library in this process, but {first} was loaded before "
        f"{second}; link or load only one of them"
    )
    assert float(logp) == pytest.approx(-1.3862944)


@pytest.mark.exhaustive
def test_a_program_that_links_a_copy_beside_another_one_works_with_the_first(
    program_of: Programs, plain_install: Path
) -> None:
    program = program_of("wheel")
    # The ops of the first copy still work.
    environment = os.environ | {"LD_PRELOAD": str(library_in(plain_install))}
    assert run(program, env=environment) == run(program)


def test_the_header_says_why_ops_cannot_be_used(program_of: Programs, tmp_path: Path) -> None:
    program = program_of("wheel")
    source, library = tmp_path / "late.c", tmp_path / "late.so"
    source.write_text('const char* simpo_ext_load_error() { return "too late"; }\n')
    run("cc", "-shared", "-fPIC", "-o", library, source)
    assert "too late" in failure(program, LD_PRELOAD=str(library))


FAKE_TORCH = {
    "TorchConfig.cmake": "add_library(torch INTERFACE IMPORTED)\nset(TORCH_LIBRARIES torch)\n",
    "TorchConfigVersion.cmake": 'set(PACKAGE_VERSION "2.9.1")\n',
}
PROJECT = "cmake_minimum_required(VERSION 3.24)\nproject(app NONE)\nfind_package(simpo_ext {})\n"


@pytest.mark.parametrize(
    ("torch_files", "message"),
    [
        ({}, "simpo_ext needs libtorch >= 2.10, and find_package(Torch) found none."),
        (FAKE_TORCH, "simpo_ext needs libtorch >= 2.10, and find_package(Torch) found 2.9.1 in"),
    ],
    ids=["without torch", "an old torch"],
)
def test_a_torch_that_does_not_do_is_explained(
    torch_files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in torch_files.items():
        (tmp_path / name).write_text(text)
    environment = {key: value for key, value in os.environ.items() if key != "CMAKE_PREFIX_PATH"}
    for required in ("REQUIRED", "0.1 REQUIRED", "0.1"):
        (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(required))
        paths = f"{tmp_path};{simpo_ext.cmake_prefix_path()}"
        command = [
            "cmake",
            "-S",
            tmp_path,
            "-B",
            tmp_path / "build",
            f"-DCMAKE_PREFIX_PATH={paths}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode != 0) == required.endswith("REQUIRED")
        assert message in " ".join(done.stderr.split())


def test_the_document_shows_what_the_example_prints(program_of: Programs) -> None:
    readme = (CSRC / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## C\+\+ API\n(.*?)(?=^## )", readme, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"linear_head/linear_head (.+)\n", section)
    (shown,) = re.findall(r"^```text\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    printed = run(program_of("wheel"), *command.split())
    number = re.compile(r"[\d.]+")
    assert number.sub("#", printed) == number.sub("#", shown)
    # Other processors round differently.
    numbers = [[float(each) for each in number.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
