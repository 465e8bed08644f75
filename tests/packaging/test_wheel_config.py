"""The configuration of wheels and releases is consistent."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOWS = ROOT / ".github" / "workflows"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CIBUILDWHEEL = PYPROJECT["tool"]["cibuildwheel"]


def text_of(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_wheels_are_built_for_the_pythons_in_the_classifiers() -> None:
    pattern = re.fullmatch(r"cp3\{([\d,]+)\}-manylinux_\*", CIBUILDWHEEL["build"])
    built = [f"3.{minor}" for minor in pattern[1].split(",")]
    label = "Programming Language :: Python :: "
    named = [line.removeprefix(label) for line in PYPROJECT["project"]["classifiers"]]
    assert [name for name in named if re.fullmatch(r"3\.\d+", name)] == built
    assert PYPROJECT["project"]["requires-python"] == f">={built[0]}"


def test_auditwheel_excludes_only_libtorch() -> None:
    command = CIBUILDWHEEL["linux"]["repair-wheel-command"]
    assert re.findall(r"--exclude (\S+)", command) == ["libtorch.so"]
    assert "--plat" not in command


def test_published_wheels_use_the_installed_nvcc() -> None:
    linux = CIBUILDWHEEL["linux"]
    folder = re.search(r"folder=\$\{1:-(.+)\}", text_of(".ci", "install-nvcc"))[1]
    assert linux["environment"]["CUDACXX"] == f"{folder}/bin/nvcc"
    assert linux["environment"]["SIMPO_CUDA"] == "ON"
    assert ".ci/install-nvcc" in linux["before-all"]


@pytest.mark.parametrize("workflow", sorted(path.name for path in WORKFLOWS.glob("*.yml")))
def test_workflows_call_existing_scripts_and_pin_actions(workflow: str) -> None:
    text = (WORKFLOWS / workflow).read_text(encoding="utf-8")
    for action in re.findall(r"uses: (.+)", text):
        if action.startswith("./"):
            assert (ROOT / action).is_file()
        else:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)
    for script in re.findall(r"(?<![\w/])\.ci/[\w.-]+", text):
        assert (ROOT / script).is_file()
    assert re.search(r"^permissions: \{\}$", text, re.MULTILINE)


def test_the_smoke_tests_exist() -> None:
    named = re.findall(r"tests/\w+/test_\w+\.py", text_of(".ci", "smoke"))
    assert named
    assert all((ROOT / name).is_file() for name in named)


# ---- a release


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A checkout of version 1.2.3, which has a date of release."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "check-tag", tmp_path / ".ci")
    sources = re.sub(r"(simpo_ext VERSION) [\d.]+", r"\1 1.2.3", text_of("CMakeLists.txt"))
    (tmp_path / "CMakeLists.txt").write_text(sources)
    changes = "# Changelog\n\n## 1.2.3 (2026-12-01)\n\n- New.\n\n## 1.2.2 (2026-11-01)\n\n- Old.\n"
    (tmp_path / "CHANGELOG.md").write_text(changes)
    return tmp_path


def check_tag(folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / ".ci" / "check-tag", tag], capture_output=True, text=True, check=False
    )


def test_a_release_needs_the_tag_of_its_version_and_prints_its_changes(release: Path) -> None:
    done = check_tag(release, "v1.2.3")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "- New.", "")
    assert '.ci/check-tag "$GITHUB_REF_NAME"' in text_of(".github", "workflows", "release.yml")


@pytest.mark.parametrize("tag", ["v1.2.4", "1.2.3", "v1.2.3rc1"])
def test_another_tag_is_no_release(release: Path, tag: str) -> None:
    done = check_tag(release, tag)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"expected v1.2.3, the version in CMakeLists.txt, got {tag}" in done.stderr


def test_a_version_without_a_date_is_no_release(release: Path) -> None:
    changes = (release / "CHANGELOG.md").read_text()
    (release / "CHANGELOG.md").write_text(changes.replace("2026-12-01", "unreleased"))
    done = check_tag(release, "v1.2.3")
    assert (done.returncode, done.stdout) == (1, "")
    assert "expected a line '## 1.2.3 (YYYY-MM-DD)'" in done.stderr
