"""Tests of the oracle of log-probabilities: derivatives, special values, and errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from support import oracle
from support.specification import (
    IGNORE,
    SCORINGS,
    P,
    T,
    V,
    batch,
    complex_step,
    specified_token_logps,
)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_token_logps_match_specification(scoring: dict[str, Any]) -> None:
    logits, labels = batch()
    logps, lse, valid = oracle.token_logps(logits, labels, **scoring)
    expected, mask = specified_token_logps(logits, labels, **scoring)
    if scoring.get("shift", True):
        assert not valid[:, -1].any() and not logps[:, -1].any() and not lse[:, -1].any()
        logps, valid = logps[:, :-1], valid[:, :-1]
    np.testing.assert_array_equal(valid, mask)
    np.testing.assert_allclose(logps, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_token_logps_grad(scoring: dict[str, Any]) -> None:
    logits, labels = batch()
    grad = np.random.default_rng(1).standard_normal((2 * P, T))
    width = T - scoring.get("shift", True)
    expected = complex_step(
        lambda x: (specified_token_logps(x, labels, **scoring)[0] * grad[:, :width]).sum(), logits
    )
    actual = oracle.token_logps_grad(grad, logits, labels, **scoring)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


def test_low_precision_logits_are_not_rounded() -> None:
    logits, labels = batch()
    half = logits.astype(np.float16)
    expected = oracle.token_logps(half.astype(np.float64), labels)[0]
    np.testing.assert_array_equal(oracle.token_logps(half, labels)[0], expected)


def test_extreme_logits_keep_relative_accuracy() -> None:
    logps, lse, _ = oracle.token_logps([[[1e4, 1e4 - 50.0, -1e300]]], [[0]], shift=False)
    assert math.isclose(logps[0, 0], -math.exp(-50.0), rel_tol=1e-14) and lse[0, 0] == 1e4
    grad = oracle.token_logps_grad([[1.0]], [[[1e4, 1e4 - 50.0, -1e300]]], [[0]], shift=False)
    np.testing.assert_allclose(grad[0, 0], [math.exp(-50.0), -math.exp(-50.0), 0.0], rtol=1e-14)


def test_special_rows() -> None:
    inf, nan = np.inf, np.nan
    rows = [[nan, 0.0], [inf, 0.0], [-inf, -inf], [-inf, 3.0], [-inf, 3.0], [nan, inf], [nan, nan]]
    labels = np.array([[0, 1, 1, 0, 1, IGNORE, 0]])
    grad = np.array([[1.0, 1.0, 1.0, 2.0, 2.0, 5.0, 0.0]])
    logps, lse, valid = oracle.token_logps([rows], labels, shift=False)
    np.testing.assert_array_equal(valid[0], [True] * 5 + [False, True])
    np.testing.assert_array_equal(logps[0], [nan, nan, nan, -inf, 0.0, 0.0, nan])
    np.testing.assert_array_equal(lse[0], [nan, nan, -inf, 3.0, 3.0, 0.0, nan])
    dlogits = oracle.token_logps_grad(grad, [rows], labels, shift=False)[0]
    assert np.isnan(dlogits[:3]).all()
    np.testing.assert_array_equal(dlogits[3:], [[2.0, -2.0], [0, 0], [0, 0], [0, 0]])
    # With a softcap infinite logits are bounded and flat; NaN stays NaN.
    logps, lse, _ = oracle.token_logps([rows], labels, shift=False, softcap=2.0)
    assert np.isnan(logps[0, 0]) and np.isnan(lse[0, 0])
    assert np.isfinite(logps[0, 1:5]).all()
    assert math.isclose(logps[0, 2], -math.log(2.0)) and math.isclose(
        lse[0, 2], math.log(2.0) - 2.0
    )
    assert math.isclose(logps[0, 1], -math.log1p(math.exp(2.0)))
    dlogits = oracle.token_logps_grad(grad, [rows], labels, shift=False, softcap=2.0)[0]
    assert dlogits[1, 0] == 0.0 and dlogits[1, 1] > 0.8 and not dlogits[2].any()


def test_labels_outside_the_vocabulary() -> None:
    logits = np.zeros((1, 3, V))
    with pytest.raises(IndexError, match=r"label 7 at \(0, 2\)"):
        oracle.token_logps(logits, [[0, 0, V]])
    assert oracle.token_logps(logits, [[V, 0, 0]])[2].sum() == 2  # Position 0 is not scored.
    assert oracle.token_logps(logits, [[0, V, V]], ignore_index=V)[2].sum() == 0
    assert oracle.token_logps(logits[:, :1], [[3]])[2].sum() == 0


def test_sequence_logps() -> None:
    inf, nan = np.inf, np.nan
    values = np.array([[1e16, 1.0, -1e16], [-inf, -1.0, nan], [-1.0, nan, -1.0], [nan] * 3])
    valid = np.array([[True] * 3, [True, True, False], [True] * 3, [False] * 3])
    logps, counts = oracle.sequence_logps(values, valid, average_log_prob=False)
    np.testing.assert_array_equal(logps, [1.0, -inf, nan, nan])
    np.testing.assert_array_equal(counts, [3, 2, 3, 0])
    logps, _ = oracle.sequence_logps(values, valid)
    np.testing.assert_array_equal(logps, [1.0 / 3.0, -inf, nan, nan])
