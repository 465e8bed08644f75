"""The tag in an op's error message becomes the error's class, and users see messages without tags.

tests/cpp tests the C++ front end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import simpo_ext
from simpo_ext import _C
from simpo_ext._ops.registry import call

B, T, V, H = 2, 3, 5, 4
LOGITS = torch.zeros(B, T, V)
LABELS = torch.zeros(B, T, dtype=torch.int64)
OPS = torch.ops.simpo_ext

pytestmark = pytest.mark.cpu_only


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "label": (
        lambda: simpo_ext.token_logps(LOGITS, torch.full_like(LABELS, V), shift=False),
        IndexError,
        "labels[0, 0] is out of range: expected ignore_index (-100) or a value in [0, 5), got 5",
    ),
    "pair": (
        lambda: simpo_ext.simpo_loss(LOGITS, LABELS, pairs=torch.tensor([[0, 2]])),
        IndexError,
        "pairs[0, 1] is out of range: expected a sequence in [0, 2), got 2",
    ),
    "cu_seqlens": (
        lambda: simpo_ext.token_logps(LOGITS[0], LABELS[0], cu_seqlens=torch.tensor([0, 4])),
        ValueError,
        "cu_seqlens[1]: expected at most N = 3, got 4",
    ),
    "num_valid_tokens": (
        lambda: simpo_ext.linear_token_logps(
            torch.zeros(B, T, H), torch.zeros(V, H), LABELS, num_valid_tokens=1
        ),
        ValueError,
        "num_valid_tokens: expected at least 4, the number of valid tokens in labels, got 1",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_tag_becomes_the_class_of_the_error(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert (type(caught.value), str(caught.value)) == (kind, message)


def test_errors_of_the_ops_have_tags() -> None:
    # The class depends on the version of torch, but the text does not.
    wrong = torch.full_like(LABELS, V)
    with pytest.raises((IndexError, RuntimeError)) as caught:
        OPS.token_logps(LOGITS, wrong, -100, False, 1.0, 0.0)
    assert f"{_C.INDEX_ERROR_TAG}labels[0, 0] is out of range" in str(caught.value)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        OPS.sequence_targets(LABELS[:1], torch.tensor([0, 4]), V, -100, True)
    assert f"{_C.VALUE_ERROR_TAG}cu_seqlens[1]: " in str(caught.value)


def test_errors_without_a_tag_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match=r"logits: expected shape \[B, T, V\], got \[3, 5\]"):
        call(OPS.token_logps.default, LOGITS[0], LABELS, -100, True, 1.0, 0.0)
