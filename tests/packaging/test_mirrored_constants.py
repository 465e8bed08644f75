"""Constants that exist in both C++ and Python have the same values: the headers are parsed.

Neither side can read the other's: the ops take enums as numbers, fake kernels compute the shapes of
C++ in Python, and the C++ API has its own structs of options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import simpo_ext
from simpo_ext._inputs.batch import LABEL_DTYPES
from simpo_ext._inputs.checks import LOGITS_DTYPES
from simpo_ext._ops.logits_plan import (
    CHUNK_ALIGNMENT,
    CHUNK_COLUMNS,
    DEFAULT_LOGITS_BUDGET_BYTES,
    DEFAULT_LOGITS_BUDGET_SHARE,
)
from simpo_ext._ops.records import ENUMS, METRIC_NAMES
from support.paths import ROOT
from support.signatures import keywords

INCLUDE = "include/simpo_ext"


def read(header: str) -> str:
    """The text of a header in csrc/ without comments."""
    return re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text())


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def constant(header: str, name: str) -> float:
    """A number in a header: a literal, or a shift of a literal."""
    found = re.search(rf"\b{name} = (?:int64_t\{{)?([\d.e+-]+)\}}?(?: << (\d+))?[;,]", read(header))
    assert found, f"{header} does not define {name}"
    return float(found[1]) * 2 ** int(found[2] or 0)


# ---- enums and metrics ---------------------------------------------------------------------------


def enumerators(header: str, name: str) -> list[tuple[str, str]]:
    """The names of an enum's members in snake case, and the texts of their values."""
    found = re.search(rf"enum (?:class )?{name} : \w+ \{{([^}}]*)\}}", read(header))
    assert found, f"{header} has no enum {name}"
    members = re.findall(r"\bk(\w+)(?: = (\d+))?", found[1])
    return [(snake_case(member), value) for member, value in members]


@pytest.mark.parametrize(
    ("core_name", "api_name", "values"),
    [
        ("LossType", "LossType", ENUMS["loss_type"]),
        ("Reduction", "Reduction", ENUMS["reduction"]),
        ("SftReduction", "SftReduction", ENUMS["sft_reduction"]),
        ("EmptyPolicy", "Empty", ENUMS["empty"]),
    ],
)
def test_enums(core_name: str, api_name: str, values: tuple[str, ...]) -> None:
    want = [(name, str(number)) for number, name in enumerate(values)]
    assert enumerators("core/loss_math.h", core_name) == want
    assert enumerators(f"{INCLUDE}/options.h", api_name) == want


def test_metrics_and_their_order() -> None:
    members = [name for name, _ in enumerators("core/kernels.h", "Metric")]
    assert members == [*(name.replace("/", "_") for name in METRIC_NAMES), "num_metrics"]
    found = re.search(
        r"array<const char\*, (\d+)> kMetricNames\{([^}]*)\}", read(f"{INCLUDE}/options.h")
    )
    assert found
    assert int(found[1]) == len(METRIC_NAMES)
    assert tuple(re.findall(r'"([^"]+)"', found[2])) == METRIC_NAMES


# ---- logits from hidden states -------------------------------------------------------------------


def test_chunks_of_the_vocabulary() -> None:
    plan = "ops/linear/plan.h"
    assert {
        "cpu": constant(plan, "kCpuChunkColumns"),
        "cuda": constant(plan, "kCudaChunkColumns"),
    } == CHUNK_COLUMNS
    assert constant(plan, "kChunkAlignment") == CHUNK_ALIGNMENT


def test_default_budget_of_logits() -> None:
    budget = f"{INCLUDE}/detail/budget.h"
    assert constant(budget, "kDefaultLogitsBudgetShare") == DEFAULT_LOGITS_BUDGET_SHARE
    assert constant(budget, "kDefaultLogitsBudgetBytes") == DEFAULT_LOGITS_BUDGET_BYTES


# ---- dtypes --------------------------------------------------------------------------------------


def test_dtypes_of_arguments() -> None:
    dtypes = {
        "Double": torch.float64, "Float": torch.float32, "BFloat16": torch.bfloat16,
        "Half": torch.float16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8,
    }  # fmt: skip
    checks = read(f"{INCLUDE}/detail/checks.h")

    def accepted(function: str) -> set[torch.dtype]:
        body = checks[checks.index(f"inline void {function}(") :].split("\n}\n")[0]
        return {dtypes[name] for name in re.findall(r"dtype == at::k(\w+)", body)}

    of_ops = re.findall(r"case ScalarType::(\w+)", read("ops/checks.h"))
    assert {dtypes[name] for name in of_ops} == accepted("check_floating") == {*LOGITS_DTYPES}
    assert accepted("check_labels") == {*LABEL_DTYPES}


# ---- options -------------------------------------------------------------------------------------


def members(struct: str) -> Iterator[tuple[str, Any]]:
    """The name and default of each member of a struct of options, as Python values."""
    text = read(f"{INCLUDE}/options.h")
    body = text[text.index(f"struct {struct} {{") :].split("\n};")[0]
    for name, default in re.findall(r"^  [\w:<>]+ (\w+)(?: = ([^;]+)|\{\});", body, re.MULTILINE):
        if "::k" in default:
            enum, member = default.split("::k")
            assert snake_case(member) in ENUMS[snake_case(enum)]
            yield name, snake_case(member)
        elif default in ("true", "false"):
            yield name, default == "true"
        else:
            yield name, float(default) if default else None


def test_defaults_of_token_options() -> None:
    want = keywords(simpo_ext.token_logps)
    del want["cu_seqlens"]  # a member of Layout
    assert dict(members("TokenLogpsOptions")) == want


def test_defaults_of_linear_options() -> None:
    options = dict(members("LinearOptions"))
    want = keywords(simpo_ext.linear_token_logps)
    assert {"bias", "logits_budget_bytes", "num_valid_tokens"} == options.keys()
    assert options == {name: want[name] for name in options}


def test_defaults_of_loss_options() -> None:
    options = dict(members("SimPOOptions"))
    tokens = dict(members("TokenLogpsOptions"))
    assert options.pop("tokens") is None  # the struct TokenLogpsOptions
    # In Python, normalizer is a number or (pairs, tokens).
    assert options.pop("pair_normalizer") is options.pop("token_normalizer") is None
    # At most one of the two may be given. C++ sets the default when it checks them.
    assert options.pop("gamma") is options.pop("gamma_beta_ratio") is None
    checks = read(f"{INCLUDE}/detail/checks.h")
    found = re.search(r"loss_type == LossType::kIpo \? ([\d.]+) : ([\d.]+);", checks)
    assert found
    ratios = {"sigmoid": float(found[2]), "hinge": float(found[2]), "ipo": float(found[1])}
    assert ratios.keys() == {*ENUMS["loss_type"]}

    for loss_type, ratio in ratios.items():
        module = simpo_ext.SimPOLoss(loss_type=loss_type)
        assert module.gamma_beta_ratio == ratio
    want = vars(simpo_ext.SimPOLoss())
    assert {name: want[name] for name in options} == options
    assert {name: want[name] for name in tokens} == tokens
    # C++ lacks only presets and reports.
    missing = keywords(simpo_ext.SimPOLoss) - {**options, **tokens}.keys()
    assert missing == {"preset", "report", "normalizer", "gamma", "gamma_beta_ratio"}


def ranges() -> dict[str, tuple[str, list[float]]]:
    """The kind and the bounds of each number's check in detail/checks.h."""
    text = re.sub(r"\s+", " ", read(f"{INCLUDE}/detail/checks.h"))
    calls = re.findall(r'\bcheck_(\w+)\( ?"(\w+)", [\w.*]+((?:, [\w.]+)*)\);', text)
    bounds = {
        name: constant(f"{INCLUDE}/options.h", name) for name in ("kLeastFactor", "kLargestFactor")
    }
    return {
        name: (kind, [bounds.get(bound) or float(bound) for bound in given.split(", ")[1:]])
        for kind, name, given in calls
        if kind in ("finite", "above", "at_least", "between", "zero_or_magnitude_between")
    }


RANGES = ranges()
SCALAR_OPTIONS = {
    "logit_scale", "softcap", "beta", "label_smoothing", "alpha", "sft_weight", "gamma_beta_ratio",
}  # fmt: skip


def edges(kind: str, bounds: list[float]) -> tuple[list[float], list[float]]:
    """Numbers at the edges of a range, inside and outside."""
    inside: list[float] = []
    outside = [math.inf, -math.inf, math.nan]
    for bound, direction in zip(bounds, (-math.inf, math.inf), strict=False):
        if kind == "above":
            inside.append(math.nextafter(bound, math.inf))
            outside.append(bound)
        else:
            inside.append(bound)
            outside.append(math.nextafter(bound, direction))
    if kind == "finite":
        inside += [-1e300, 0.0, 1e300]
    if kind == "zero_or_magnitude_between":
        inside += [0.0, *(-number for number in inside)]
        outside += [-number for number in outside]
    return inside, outside


def test_every_number_has_a_range_in_cpp() -> None:
    assert RANGES.keys() == SCALAR_OPTIONS


@pytest.mark.parametrize("name", sorted(SCALAR_OPTIONS))
def test_ranges_of_numbers(name: str) -> None:
    inside, outside = edges(*RANGES[name])
    for number in inside:
        simpo_ext.SimPOLoss(**{name: number})
    for number in outside:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            simpo_ext.SimPOLoss(**{name: number})
