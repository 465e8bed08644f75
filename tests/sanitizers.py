"""Whether a sanitizer can be used on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def skip_unless_sanitizer_works(sanitizer: str, folder: Path) -> None:
    """Its runtime may be missing, or at odds with the kernel's address space layout."""
    (folder / "probe.cpp").write_text("int main() {}")
    flags = [f"-fsanitize={sanitizer}", "-o", "probe"]
    compiled = subprocess.run(["c++", "probe.cpp", *flags], cwd=folder, check=False)
    if compiled.returncode or subprocess.run(["./probe"], cwd=folder, check=False).returncode:
        pytest.skip(f"-fsanitize={sanitizer} does not work on this machine")
