"""The checks of wheels find each fault, in small wheels made for the tests."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.paths import ROOT


def load(name: str, file: str) -> ModuleType:
    loader = SourceFileLoader(name, str(ROOT / ".ci" / file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # The script imports the checks from here.
    loader.exec_module(module)
    return module


wheel_checks = load("wheel_checks", "wheel_checks.py")
wheel_script = load("wheel_script", "wheel")

VERSION = wheel_checks.version_of_sources()
NAME = f"simpo_ext-{VERSION}-cp311-cp311-manylinux_2_28_x86_64.whl"
INFO = f"simpo_ext-{VERSION}.dist-info"
LIBRARY = "simpo_ext/lib/libsimpo_ext.so"
MODULE = "simpo_ext/_C.cpython-311-x86_64-linux-gnu.so"
NOTICES = "licenses/csrc/THIRD-PARTY-NOTICES.txt"
METADATA = f"""Metadata-Version: 2.4
Name: simpo_ext
Version: {VERSION}
License-Expression: Apache-2.0
License-File: LICENSE
License-File: csrc/THIRD-PARTY-NOTICES.txt
Requires-Python: >=3.10
Requires-Dist: torch>=2.10
Provides-Extra: demo
Requires-Dist: tqdm>=4.64; extra == "demo"

# simpo_ext
"""
WHEEL = """Wheel-Version: 1.0
Root-Is-Purelib: false
Tag: cp311-cp311-manylinux_2_28_x86_64
"""


@dataclasses.dataclass
class Wheel:
    """The contents of a wheel, which a test may change before writing it."""

    files: dict[str, bytes]
    name: str = NAME
    record: Callable[[str], str] = lambda text: text

    def replace(self, file: str, old: str, new: str) -> None:
        assert old in self.files[file].decode()
        self.files[file] = self.files[file].decode().replace(old, new).encode()

    def faults(self, folder: Path) -> list[str]:
        return wheel_checks.faults(self.write(folder))

    def write(self, folder: Path) -> Path:
        lines = [f"{INFO}/RECORD,,"]
        for name, content in self.files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            lines.append(f"{name},sha256={digest.rstrip('=')},{len(content)}")
        with zipfile.ZipFile(folder / self.name, "w") as archive:
            for name, content in self.files.items():
                archive.writestr(name, content)
            archive.writestr(f"{INFO}/RECORD", self.record("\n".join(lines)))
        return folder / self.name


class Linker:
    """Links empty shared libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "empty.c").write_text("")

    def __call__(self, needed: tuple[str, ...], *flags: str, source: str = "empty.c") -> bytes:
        for name in needed:
            self.run("empty.c", f"-Wl,-soname,{name}", "-o", name)
        self.run(source, "-Wl,--no-as-needed", *needed, "-Wl,--enable-new-dtags", *flags)
        return (self.folder / "a.out").read_bytes()

    def run(self, *arguments: str) -> None:
        command = ["cc", "-shared", "-fPIC", *arguments]
        subprocess.run(command, cwd=self.folder, check=True)


RUNPATH = "-Wl,-rpath,$ORIGIN/../../torch/lib"


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Linker:
    return Linker(tmp_path_factory.mktemp("binaries"))


@pytest.fixture(scope="module")
def good_files(link: Linker) -> dict[str, bytes]:
    tags = wheel_checks.parse_name(NAME)
    files = {name: b"" for name in sorted(wheel_checks._expected_files(tags))}
    del files[f"{INFO}/RECORD"]
    return {
        **files,
        LIBRARY: link(("libtorch.so",), RUNPATH),
        MODULE: link(("libsimpo_ext.so",), "-Wl,-rpath,$ORIGIN/lib"),
        f"{INFO}/METADATA": METADATA.encode(),
        f"{INFO}/WHEEL": WHEEL.encode(),
        f"{INFO}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
        f"{INFO}/{NOTICES}": (ROOT / "csrc" / "THIRD-PARTY-NOTICES.txt").read_bytes(),
    }


@pytest.fixture
def wheel(good_files: dict[str, bytes]) -> Wheel:
    return Wheel(dict(good_files))


def test_a_good_wheel_has_no_faults(wheel: Wheel, tmp_path: Path) -> None:
    assert wheel.faults(tmp_path) == []
    described = wheel_checks.describe(tmp_path / NAME)
    content = (tmp_path / NAME).read_bytes()
    assert described == {
        "wheel": NAME,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "cuda_kernels": False,
    }


@pytest.mark.parametrize(
    "name",
    [
        f"simpo_ext-{VERSION}-cp311-cp311-linux_x86_64.whl",
        f"simpo_ext-{VERSION}-cp311-abi3-manylinux_2_28_x86_64.whl",
        f"simpo_ext-{VERSION}-cp314-cp314t-manylinux_2_28_x86_64.whl",
        f"simpo_ext-{VERSION}-py3-none-any.whl",
        f"simpo_ext-{VERSION}-cp311-cp311-manylinux_2_28_x86_64.manylinux_2_28_aarch64.whl",
    ],
)
def test_a_name_that_may_not_be_published(wheel: Wheel, name: str, tmp_path: Path) -> None:
    wheel.name = name
    (fault,) = wheel.faults(tmp_path)
    assert fault.startswith(f"{name}: expected ")


def test_two_platforms_of_one_machine_are_in_order(wheel: Wheel, tmp_path: Path) -> None:
    wheel.name = NAME.replace("_2_28_x86_64", "_2_27_x86_64.manylinux_2_28_x86_64")
    wheel.files[f"{INFO}/WHEEL"] += b"Tag: cp311-cp311-manylinux_2_27_x86_64\n"
    assert wheel.faults(tmp_path) == []


@pytest.mark.parametrize(
    ("needed", "flags", "fault"),
    [
        (("libtorch.so", "libtorch_cpu.so"), (RUNPATH,), f"{LIBRARY} needs libtorch_cpu.so,"),
        (("libtorch.so", "libc10.so"), (RUNPATH,), f"{LIBRARY} needs libc10.so,"),
        (("libtorch.so", "libcudart.so.13"), (RUNPATH,), f"{LIBRARY} needs libcudart.so.13,"),
        (("libtorch.so", "libcuda.so.1"), (RUNPATH,), f"{LIBRARY} needs libcuda.so.1,"),
        ((), (RUNPATH,), f"{LIBRARY} does not need libtorch.so"),
        (("libtorch.so",), (), f"{LIBRARY} searches [],"),
        (("libtorch.so",), (f"{RUNPATH}:/opt/torch",), f"{LIBRARY} searches ['$ORIGIN/../../"),
        (("libtorch.so",), (RUNPATH, "-Wl,--disable-new-dtags"), f"{LIBRARY} searches "),
    ],
)
def test_wrong_links_of_the_library(
    wheel: Wheel,
    link: Linker,
    needed: tuple[str, ...],
    flags: tuple[str, ...],
    fault: str,
    tmp_path: Path,
) -> None:
    wheel.files[LIBRARY] = link(needed, *flags)
    (found,) = wheel.faults(tmp_path)
    assert found.startswith(fault)


def test_a_module_that_links_torch(wheel: Wheel, link: Linker, tmp_path: Path) -> None:
    wheel.files[MODULE] = link(("libsimpo_ext.so", "libtorch.so"), "-Wl,-rpath,$ORIGIN/lib")
    (found,) = wheel.faults(tmp_path)
    assert found.startswith(f"{MODULE} needs libtorch.so,")


def test_a_path_of_the_machine_in_a_binary(wheel: Wheel, link: Linker, tmp_path: Path) -> None:
    source = link.folder / "named.c"
    source.write_text("const char* where(void) { return __FILE__; }")
    wheel.files[LIBRARY] = link(("libtorch.so",), RUNPATH, source=str(source))
    (found,) = wheel.faults(tmp_path)
    assert found.endswith(str(source))
    prefix_map = f"-fmacro-prefix-map={link.folder}/="
    wheel.files[LIBRARY] = link(("libtorch.so",), RUNPATH, prefix_map, source=str(source))
    assert wheel.faults(tmp_path) == []


def test_a_path_of_the_machine_in_the_cmake_package(wheel: Wheel, tmp_path: Path) -> None:
    name = "simpo_ext/share/cmake/simpo_ext/simpo_extTargets.cmake"
    wheel.files[name] = (
        b'set(include "${_IMPORT_PREFIX}/simpo_ext/include" "/home/me/csrc/include")'
    )
    (found,) = wheel.faults(tmp_path)
    assert found.endswith('"/home/me/csrc/include"')


@pytest.mark.parametrize(
    "name",
    [MODULE, f"{INFO}/{NOTICES}", "simpo_ext/py.typed", "simpo_ext/include/simpo_ext/options.h"],
)
def test_a_missing_file(wheel: Wheel, name: str, tmp_path: Path) -> None:
    del wheel.files[name]
    assert wheel.faults(tmp_path) == [f"{name} is missing"]


@pytest.mark.parametrize(
    "name",
    [
        "simpo_ext/lib/libtorch.so",
        "simpo_ext.libs/libgomp.so.1",
        "tests/oracle.py",
        "a.pyc",
    ],
)
def test_a_stray_file(wheel: Wheel, name: str, tmp_path: Path) -> None:
    wheel.files[name] = b""
    assert f"{name} does not belong there" in wheel.faults(tmp_path)


def test_a_changed_licence(wheel: Wheel, tmp_path: Path) -> None:
    wheel.files[f"{INFO}/licenses/LICENSE"] += b"."
    assert wheel.faults(tmp_path) == ["LICENSE is not the file of the sources"]


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("METADATA", ">=3.10", ">=3.9", "METADATA has Requires-Python '>=3.9', expected"),
        ("METADATA", "torch>=2.10", "torch==2.13.0", "METADATA has Requires-Dist ['torch=="),
        ("METADATA", '; extra == "demo"', "", "METADATA has Requires-Dist ['torch>=2.10', 'tqdm"),
        ("METADATA", "License-File: csrc", "X: csrc", "METADATA has License-File ['LICENSE'],"),
        ("WHEEL", "2_28", "2_34", "WHEEL has the tags ['cp311-cp311-manylinux_2_34_x86_64'], the"),
        ("WHEEL", "false", "true", "WHEEL has Root-Is-Purelib 'true', expected"),
    ],
)
def test_wrong_metadata(
    wheel: Wheel, file: str, old: str, new: str, fault: str, tmp_path: Path
) -> None:
    wheel.replace(f"{INFO}/{file}", old, new)
    (found,) = wheel.faults(tmp_path)
    assert found.startswith(fault)


def test_a_version_that_is_not_the_sources(wheel: Wheel, tmp_path: Path) -> None:
    wheel.replace(f"{INFO}/METADATA", f"Version: {VERSION}\n", "Version: 9.9\n")
    assert wheel.faults(tmp_path) == [
        f"METADATA has Version '9.9', expected {VERSION!r}",
        f"the file name has version {VERSION}, METADATA 9.9",
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace(",sha256=", ",sha256=0", 1), "RECORD has ('sha256=0"),
        (lambda text: f"{text}\nsimpo_ext/gone.py,,", "RECORD names simpo_ext/gone.py, which is"),
        (lambda text: text.rpartition("\n")[0], "RECORD has None for "),
        (lambda text: f"{text}\n{text.rpartition(chr(10))[2]}", "RECORD names a file twice"),
    ],
    ids=["hash", "gone", "unrecorded", "twice"],
)
def test_a_wrong_record(
    wheel: Wheel, change: Callable[[str], str], fault: str, tmp_path: Path
) -> None:
    wheel.record = change
    (found,) = wheel.faults(tmp_path)
    assert found.startswith(fault)


def test_a_large_wheel(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_checks, "LARGEST_WHEEL", 1000)
    (found,) = wheel.faults(tmp_path)
    assert found.endswith("bytes, expected at most 1000")


# ---- the script


class NoEnvironment:
    """Replaces the virtual environment. Its linters find nothing."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python = python

    def install(self, *requirements: str | Path) -> None:
        pass

    def run(self, *command: str | Path) -> None:
        pass


def run_script(
    monkeypatch: pytest.MonkeyPatch, smoke: dict[str, Any] | None, *arguments: str | Path
) -> int:
    monkeypatch.setattr(wheel_script, "Environment", NoEnvironment)
    monkeypatch.setattr(wheel_script, "smoke", lambda python, torch, wheel: smoke)
    monkeypatch.setattr(sys, "argv", ["wheel", *map(str, arguments)])
    return wheel_script.main()


def smoke_result(*, ok: bool) -> dict[str, Any]:
    versions = {"torch": "2.10.0+cu128", "torch_cuda": "12.8", "python": "3.11.7"}
    return {**versions, "tests_passed": 90, "ok": ok}


@pytest.mark.parametrize("wheel_is_right", [True, False])
@pytest.mark.parametrize("tests_pass", [True, False])
def test_the_script_fails_if_a_check_or_a_test_fails(
    wheel: Wheel,
    wheel_is_right: bool,
    tests_pass: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not wheel_is_right:
        del wheel.files[LIBRARY]
    arguments = ("--check", wheel.write(tmp_path), "--torch", "2.10.0")
    status = run_script(monkeypatch, smoke_result(ok=tests_pass), *arguments)
    assert status == (0 if wheel_is_right and tests_pass else 1)
    printed = capsys.readouterr().out
    assert (f"{LIBRARY} is missing" in printed) == (not wheel_is_right)
    tests = "90 passed" if tests_pass else "FAILED"
    assert f"| 2.10.0+cu128 | 12.8 | 3.11.7 | {tests} |" in printed


def test_results_replace_only_those_of_the_same_wheel(
    wheel: Wheel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "results.json"
    other = {
        "wheel": NAME.replace("cp311", "cp313"),
        "bytes": 2**20,
        "cuda_kernels": True,
        "results": [{**smoke_result(ok=True), "python": "3.13.0"}],
    }
    file.write_text(json.dumps([{"wheel": NAME, "results": []}, other]))
    path = wheel.write(tmp_path)
    run_script(monkeypatch, smoke_result(ok=True), "--check", path, "--torch", "2", "--json", file)
    expected = {**wheel_checks.describe(path), "ok": True, "results": [smoke_result(ok=True)]}
    assert json.loads(file.read_text()) == [other, expected]
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("| cp313-manylinux_2_28_x86_64, CPU and CUDA, 1.0 MiB | 2.10.0+cu128 |")
    assert "| 3.11.7 | 90 passed |" in second
