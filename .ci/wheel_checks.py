"""What a wheel of simpo_ext must be before anyone installs it. Needs readelf, of binutils."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Twice of what nvcc 13 and four architectures come to.
LARGEST_WHEEL = 4 * 2**20

_NAME = re.compile(
    r"simpo_ext-(?P<version>[^-]+)-(?P<python>cp3\d+)-(?P<abi>cp3\d+)-(?P<platforms>[^-]+)\.whl"
)
_PLATFORM = re.compile(r"manylinux_2_(?P<glibc>\d+)_(?P<machine>x86_64|aarch64)")
_SYSTEM_LIBRARY = re.compile(
    r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d+|ld-linux-(x86-64|aarch64)\.so\.\d+"
)
# The absolute path of a source file, as __FILE__ and debug information have them.
_SOURCE_PATH = re.compile(rb"(?<![\w.$}])/(?:[\w.+@-]+/)+[\w.+-]+\.(?:cpp|hpp|cuh|inl|cc|cu|c|h)\b")

_LIBRARY = "simpo_ext/lib/libsimpo_ext.so"
_CMAKE = "simpo_ext/share/cmake/simpo_ext/simpo_ext"
_LICENSES = ("LICENSE", "csrc/THIRD-PARTY-NOTICES.txt")


class Tags(NamedTuple):
    """What a wheel's file name says."""

    version: str
    python: str  # "cp311", of interpreter and ABI
    platforms: tuple[str, ...]  # "manylinux_2_28_x86_64"
    machine: str  # "x86_64" or "aarch64"


def parse_name(name: str) -> Tags | None:
    """The tags of a wheel that may be published, or None: of one interpreter, and of manylinux."""
    match = _NAME.fullmatch(name)
    if match is None or match["python"] != match["abi"]:
        return None
    platforms = tuple(match["platforms"].split("."))
    matches = [_PLATFORM.fullmatch(platform) for platform in platforms]
    machines = {match["machine"] if match else None for match in matches}
    machine = machines.pop()
    if machine is None or machines:
        return None
    return Tags(match["version"], match["python"], platforms, machine)


def version_of_sources() -> str:
    """The version that CMakeLists.txt states."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    match = re.search(r"project\(simpo_ext VERSION ([0-9.]+)", text)
    assert match is not None
    return match[1]


def describe(wheel: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of the wheel, and whether it has CUDA kernels."""
    content = wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        has_library = _LIBRARY in archive.namelist()
        has_cuda = has_library and b".nv_fatbin\0" in archive.read(_LIBRARY)
    return {
        "wheel": wheel.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "cuda_kernels": has_cuda,
    }


def faults(wheel: Path) -> list[str]:
    """What is wrong with the wheel, a sentence each; empty if nothing is."""
    tags = parse_name(wheel.name)
    if tags is None:
        return [f"{wheel.name}: expected simpo_ext-VERSION-cpXY-cpXY-manylinux_2_N_MACHINE.whl"]
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    return [
        *_size_faults(wheel),
        *_content_faults(files, tags),
        *_record_faults(files, tags),
        *_metadata_faults(files, tags),
        *_path_faults(files),
        *_binary_faults(files, tags),
    ]


def _size_faults(wheel: Path) -> Iterator[str]:
    size = wheel.stat().st_size
    if size > LARGEST_WHEEL:
        yield f"the wheel has {size} bytes, expected at most {LARGEST_WHEEL}"


def _dist_info(tags: Tags) -> str:
    return f"simpo_ext-{tags.version}.dist-info"


def _module(tags: Tags) -> str:
    return f"simpo_ext/_C.cpython-{tags.python.removeprefix('cp')}-{tags.machine}-linux-gnu.so"


def _expected_files(tags: Tags) -> set[str]:
    package, headers = ROOT / "simpo_ext", ROOT / "csrc" / "include"
    sources = [path for path in package.rglob("*") if path.suffix in {".py", ".pyi", ".typed"}]
    return {
        *(path.relative_to(ROOT).as_posix() for path in sources),
        *(
            f"simpo_ext/include/{path.relative_to(headers).as_posix()}"
            for path in headers.rglob("*.h")
        ),
        *(f"{_CMAKE}{name}.cmake" for name in ("Config", "ConfigVersion", "Targets")),
        f"{_CMAKE}Targets-release.cmake",
        _LIBRARY,
        _module(tags),
        *(f"{_dist_info(tags)}/{name}" for name in ("METADATA", "RECORD", "WHEEL")),
        *(f"{_dist_info(tags)}/licenses/{name}" for name in _LICENSES),
    }


def _content_faults(files: dict[str, bytes], tags: Tags) -> Iterator[str]:
    expected = _expected_files(tags)
    present = {name for name in files if not name.endswith("/")}
    for name in sorted(expected - present):
        yield f"{name} is missing"
    for name in sorted(present - expected):
        yield f"{name} does not belong there"
    for name in _LICENSES:
        shipped = files.get(f"{_dist_info(tags)}/licenses/{name}")
        if shipped is not None and shipped != (ROOT / name).read_bytes():
            yield f"{name} is not the file of the sources"


def _record_faults(files: dict[str, bytes], tags: Tags) -> Iterator[str]:
    record = f"{_dist_info(tags)}/RECORD"
    rows = list(csv.reader(io.StringIO(files.get(record, b"").decode())))
    recorded = {row[0]: (row[1], row[2]) for row in rows}
    if len(recorded) != len(rows):
        yield "RECORD names a file twice"
    for name in sorted(recorded.keys() - files.keys()):
        yield f"RECORD names {name}, which is missing"
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        expected = ("", "") if name == record else (f"sha256={digest}", str(len(content)))
        if not name.endswith("/") and recorded.get(name) != expected:
            yield f"RECORD has {recorded.get(name)} for {name}, expected {expected}"


def _fields(files: dict[str, bytes], name: str) -> Message:
    return message_from_bytes(files.get(name, b""))


def _metadata_faults(files: dict[str, bytes], tags: Tags) -> Iterator[str]:
    metadata = _fields(files, f"{_dist_info(tags)}/METADATA")
    required = metadata.get_all("Requires-Dist", [])
    found: dict[str, Any] = {
        "Name": metadata["Name"],
        "Version": metadata["Version"],
        "Requires-Python": metadata["Requires-Python"],
        "Requires-Dist": [line for line in required if "extra ==" not in line],
        "License-Expression": metadata["License-Expression"],
        "License-File": metadata.get_all("License-File", []),
    }
    expected: dict[str, Any] = {
        "Name": "simpo_ext",
        "Version": version_of_sources(),
        "Requires-Python": ">=3.10",
        "Requires-Dist": ["torch>=2.10"],
        "License-Expression": "Apache-2.0",
        "License-File": list(_LICENSES),
    }
    for field, value in expected.items():
        if found[field] != value:
            yield f"METADATA has {field} {found[field]!r}, expected {value!r}"
    if tags.version != metadata["Version"]:
        yield f"the file name has version {tags.version}, METADATA {metadata['Version']}"
    wheel = _fields(files, f"{_dist_info(tags)}/WHEEL")
    in_wheel = sorted(wheel.get_all("Tag", []))
    in_name = sorted(f"{tags.python}-{tags.python}-{platform}" for platform in tags.platforms)
    if in_wheel != in_name:
        yield f"WHEEL has the tags {in_wheel}, the file name {in_name}"
    if wheel["Root-Is-Purelib"] != "false":
        yield f"WHEEL has Root-Is-Purelib {wheel['Root-Is-Purelib']!r}, expected 'false'"


def _path_faults(files: dict[str, bytes]) -> Iterator[str]:
    for name, content in files.items():
        if name.endswith(".so"):
            paths = sorted(set(_SOURCE_PATH.findall(content)))
        elif name.endswith(".cmake"):
            paths = sorted(set(re.findall(rb'"/[^"$]+"', content)))
        else:
            continue
        for path in paths:
            yield f"{name} holds a path of the machine it was built on: {path.decode()}"


def _binary_faults(files: dict[str, bytes], tags: Tags) -> Iterator[str]:
    own_library, torch = "libsimpo_ext.so", "libtorch.so"
    for name, needed, runpath in (
        (_LIBRARY, torch, "$ORIGIN/../../torch/lib"),
        (_module(tags), own_library, "$ORIGIN/lib"),
    ):
        if name not in files:
            continue  # said already
        entries = _dynamic_entries(files[name])
        if needed not in entries.get("NEEDED", []):
            yield f"{name} does not need {needed}"
        for other in entries.get("NEEDED", []):
            if other != needed and not _SYSTEM_LIBRARY.fullmatch(other):
                yield f"{name} needs {other}, expected {needed} and system libraries alone"
        if entries.get("RUNPATH") != [runpath] or "RPATH" in entries:
            found = entries.get("RPATH", []) + entries.get("RUNPATH", [])
            yield f"{name} searches {found}, expected the RUNPATH {runpath!r}"


def _dynamic_entries(binary: bytes) -> dict[str, list[str]]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        printed = subprocess.run(
            ["readelf", "--dynamic", "--wide", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    entries: dict[str, list[str]] = {}
    for tag, value in re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", printed):
        entries.setdefault(tag, []).append(value)
    return entries
