"""Tests of the oracle of the loss: derivatives, the specification's examples, edge cases."""

from __future__ import annotations

import decimal
import itertools
import math
from typing import Any

import numpy as np
import pytest

from support import oracle
from support.specification import (
    IGNORE,
    SCORINGS,
    Array,
    P,
    T,
    V,
    batch,
    central_differences,
    complex_step,
    specified_loss,
    specified_token_logps,
)


def _preference_cases() -> list[dict[str, Any]]:
    """Every valid combination of loss type, sft and reduction, with both averages."""
    losses: list[dict[str, Any]] = [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"label_smoothing": 0.2},
        {"loss_type": "ipo"},
    ]
    sfts: list[dict[str, Any]] = [
        {"sft_weight": 0.0},
        {"sft_weight": 0.3},
        {"sft_weight": 0.3, "sft_reduction": "token"},
    ]
    reductions: list[dict[str, Any]] = [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"normalizer": (4.0, 9.0)},
        {"normalizer": 2.5},
    ]
    cases = []
    for loss, sft, red, avg in itertools.product(losses, sfts, reductions, (True, False)):
        per_token = sft.get("sft_reduction") == "token"
        if per_token and (red.get("reduction") == "none" or red.get("normalizer") == 2.5):
            continue
        cases.append({**loss, **sft, **red, "average_log_prob": avg, "beta": 1.3})
    return cases


CASES = _preference_cases()
# Sequences in several pairs, on one side or on both, and in no pair.
SHARED = [[0, 3], [0, 5], [4, 0]]
WEIGHTS = np.array([0.25, -1.5, 3.0])
NEW_CASES: list[dict[str, Any]] = [
    {**new, **old}
    for new in (
        {"alpha": 0.1},
        {"alpha": -0.1, "pair_weight": WEIGHTS},
        {"pairs": SHARED},
        {"pairs": SHARED, "pair_weight": WEIGHTS, "alpha": 0.05},
    )
    for old in CASES[::3]
]


def _two(chosen: Any, rejected: Any, **options: Any) -> oracle.Preference:
    """Preference loss of one-token sequences with the given log probabilities."""
    values = np.concatenate([np.atleast_1d(chosen), np.atleast_1d(rejected)]).astype(float)[:, None]
    return oracle.preference_loss(values, np.ones(values.shape, bool), **options)


@pytest.mark.parametrize("options", CASES + NEW_CASES)
def test_loss_and_gradient_match_specification(options: dict[str, Any]) -> None:
    logits, labels = batch()

    def loss(x: Array) -> Any:
        return specified_loss(*specified_token_logps(x, labels), **options)

    result, dlogits = oracle.simpo_loss(logits, labels, **options)
    np.testing.assert_allclose(result.loss, loss(logits), rtol=1e-12, atol=1e-14)
    expected = complex_step(lambda x: loss(x).sum(), logits)
    np.testing.assert_allclose(dlogits, expected, rtol=1e-11, atol=1e-15)
    assert np.abs(dlogits).max() > 1e-3


@pytest.mark.parametrize("empty", ["drop", "nan"])
@pytest.mark.parametrize("options", CASES)
def test_preference_grad_by_central_differences(options: dict[str, Any], empty: str) -> None:
    logits, labels = batch()
    if empty == "drop":
        labels[P + 1] = IGNORE
    logps, _, valid = oracle.token_logps(logits, labels)
    options = {**options, "empty": empty}
    weights: Any = np.array([0.5, -2.0, 1.5]) if options.get("reduction") == "none" else -0.7
    expected = central_differences(
        lambda x: float((weights * oracle.preference_loss(x, valid, **options).loss).sum()), logps
    )
    actual = oracle.preference_grad(logps, valid, grad_loss=weights, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


def test_specification_example_1() -> None:
    result = _two(-1.2, -2.5, beta=2.0, gamma_beta_ratio=0.5)
    assert math.isclose(result.loss, math.log1p(math.exp(-1.6)), rel_tol=1e-15)
    # The specification takes the log of sigmoid(1.6) rounded to 0.832. Unrounded it is 0.183901.
    assert abs(result.loss - 0.183901) < 5e-7
    assert round(math.exp(-result.loss), 3) == 0.832
    assert round(-math.log(0.832), 3) == round(float(result.loss), 3) == 0.184
    assert result.metrics["rewards/chosen"] == -2.4 and result.metrics["rewards/rejected"] == -5.0
    assert math.isclose(result.metrics["rewards/margins"], 2.6)


def test_specification_example_2() -> None:
    # The specification sets beta to 2.5 but adds 0.12 to 0.184, the loss at beta 2.
    carried = _two(-1.2, -2.5, beta=2.0, sft_weight=0.1)
    assert round(float(carried.loss), 3) == 0.304
    assert carried.sft_loss == 1.2
    # At beta 2.5 the preference term is -log sigmoid(2.0) = 0.126928, so the sum is 0.246928.
    for sft_reduction in ("sequence", "token"):
        result = _two(-1.2, -2.5, beta=2.5, sft_weight=0.1, sft_reduction=sft_reduction)
        assert math.isclose(result.losses[0], math.log1p(math.exp(-2.0)), rel_tol=1e-15)
        assert math.isclose(result.loss, result.losses[0] + 0.12, rel_tol=1e-15)
        assert abs(result.loss - 0.246928) < 5e-7


def test_specification_gradient_formulas() -> None:
    beta, eps, z = 2.0, 0.1, np.array([-1.0, 0.25, 0.5, 0.75])

    def slope(**options: Any) -> Array:
        values = np.concatenate([z, np.zeros(4)])[:, None]
        grad = oracle.preference_grad(
            values,
            np.ones((8, 1), bool),
            beta=beta,
            gamma_beta_ratio=0.0,
            reduction="sum",
            **options,
        )
        np.testing.assert_array_equal(grad[:4], -grad[4:])
        return grad[:4, 0]

    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    expected = -beta * sigmoid(-beta * z) * (1 - eps) + beta * sigmoid(beta * z) * eps
    np.testing.assert_allclose(slope(label_smoothing=eps), expected, rtol=1e-14)
    # The kink is z = 1 / beta = 0.5, where the subgradient is 0.
    np.testing.assert_array_equal(slope(loss_type="hinge"), [-beta, -beta, 0.0, 0.0])


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("row", [1, P + 1])
def test_dropped_pair_equals_a_batch_without_it(options: dict[str, Any], row: int) -> None:
    logits, labels = batch()
    labels[row] = IGNORE
    logits[[1, P + 1]] = np.nan  # Both sequences of the pair are not read.
    keep = [0, 2, P, P + 2]
    result, dlogits = oracle.simpo_loss(logits, labels, **options)
    expected, dexpected = oracle.simpo_loss(logits[keep], labels[keep], **options)
    np.testing.assert_array_equal(dlogits[keep], dexpected)
    assert not dlogits[[1, P + 1]].any()
    for actual, other in ((result.loss, expected.loss), (result.sft_loss, expected.sft_loss)):
        assert not actual.ndim or actual[1] == 0.0
        np.testing.assert_array_equal(actual[[0, 2]] if actual.ndim else actual, other)
    np.testing.assert_array_equal(result.losses[[0, 2]], expected.losses)
    assert result.losses[1] == 0.0 and np.isnan([result.chosen_logps, result.rejected_logps]).any()
    assert result.metrics == {**expected.metrics, "dropped_pairs": 1}


def test_empty_sequence_as_nan() -> None:
    logits, labels = batch()
    labels[P + 1] = IGNORE
    result, dlogits = oracle.simpo_loss(logits, labels, empty="nan")
    assert np.isnan(result.loss) and np.isnan(result.losses).tolist() == [False, True, False]
    assert result.metrics["num_pairs"] == 3 and result.metrics["dropped_pairs"] == 0
    assert np.isfinite(dlogits[[0, 2, P, P + 1, P + 2]]).all() and not dlogits[P + 1].any()
    scored = [True, True, False, True, True, False]
    np.testing.assert_array_equal(np.isnan(dlogits[1]), np.repeat(scored, V).reshape(T, V))


@pytest.mark.parametrize("sft", ["sequence", "token"])
def test_a_batch_without_counted_pairs(sft: str) -> None:
    options: dict[str, Any] = {"sft_weight": 0.5, "sft_reduction": sft}
    for rows, empty, reduction in itertools.product((0, 4), ("drop", "nan"), ("mean", "sum")):
        values, valid = np.full((rows, 2), np.nan), np.zeros((rows, 2), bool)
        keywords = {**options, "empty": empty, "reduction": reduction}
        result = oracle.preference_loss(values, valid, **keywords)
        is_nan = empty == "nan" and (rows > 0 or reduction == "mean")
        np.testing.assert_array_equal(result.loss, np.nan if is_nan else 0.0)
        assert result.metrics["num_pairs"] == (rows // 2 if empty == "nan" else 0)
        assert math.isnan(result.metrics["rewards/accuracies"]) == (not result.metrics["num_pairs"])
        assert not oracle.preference_grad(values, valid, **keywords).any()


def test_infinite_margins() -> None:
    inf = np.inf
    valid, values = np.ones((2, 1), bool), np.array([[-inf], [-1.0]])
    assert _two(-1.0, -inf).loss == 0.0 and _two(-inf, -1.0).loss == inf
    assert _two(-1.0, -inf, loss_type="hinge").loss == 0.0
    assert _two(-1.0, -inf, label_smoothing=0.1).loss == inf
    assert np.isnan(_two(-inf, -inf).loss) and np.isnan(_two(-inf, -inf, loss_type="hinge").loss)
    for options in ({}, {"loss_type": "hinge"}):
        grad = oracle.preference_grad(values, valid, **options)
        np.testing.assert_array_equal(grad[:, 0], [-2.0, 2.0])
        assert np.isnan(oracle.preference_grad(np.full((2, 1), -inf), valid, **options)).all()
    far = _two([-1e5, 0.0], [0.0, -400.0], reduction="none", gamma_beta_ratio=0.0)
    np.testing.assert_allclose(far.loss, [2e5, 0.0], rtol=1e-15)
    assert _two(0.0, -300.0, gamma_beta_ratio=0.0).loss == math.exp(-600.0)


def test_metrics() -> None:
    metrics = _two([-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0], beta=0.5, loss_type="hinge").metrics
    assert metrics["rewards/accuracies"] == 1 / 3  # A tie is not a win.
    assert metrics["rewards/margins"] == pytest.approx(-0.5 / 3)
    assert metrics["logps/chosen"] == -2.0 and metrics["logps/rejected"] == -5.0 / 3
    assert metrics["rewards/chosen"] == -1.0 and metrics["num_tokens"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dpo"},
        {"label_smoothing": 0.6},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"loss_type": "ipo", "label_smoothing": 0.1},
        {"pair_weight": [1.0, 1.0]},
        {"sft_weight": -0.1},
        {"sft_reduction": "token", "reduction": "none"},
        {"normalizer": 2.0, "reduction": "sum"},
        {"normalizer": 2.0, "sft_weight": 0.1, "sft_reduction": "token"},
    ],
)
def test_meaningless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        _two(-1.0, -2.0, **options)


# ---- pairs, weights, variants, packed sequences --------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-20, 1e-6, 0.1, 1.0, 5.0, -0.5, -3.0])
def test_alpha_reward_and_its_slope_in_decimal_arithmetic(alpha: float) -> None:
    logps = [-1e-200, -1e-5, -0.7, -3.0, -40.0]
    with decimal.localcontext(prec=400):
        a = decimal.Decimal(alpha)
        powers = [(-a * decimal.Decimal(logp)).exp() for logp in logps]
        rewards = [float((1 - power) / a) for power in powers]
        slopes = [float(power) for power in powers]
    options: dict[str, Any] = {"alpha": alpha, "beta": 2.0, "loss_type": "ipo", "reduction": "sum"}
    result = _two(logps, logps[::-1], **options)
    np.testing.assert_allclose(result.chosen_rewards, 2.0 * np.array(rewards), rtol=1e-14)
    np.testing.assert_array_equal(result.rejected_rewards, result.chosen_rewards[::-1])
    np.testing.assert_array_equal(result.chosen_logps, logps)
    z = np.subtract(rewards, rewards[::-1])
    np.testing.assert_allclose(result.losses, (z - 0.25) ** 2, rtol=1e-13)
    values = np.array([*logps, *logps[::-1]])[:, None]
    grad = oracle.preference_grad(values, np.ones((10, 1), bool), **options)[:5, 0]
    np.testing.assert_allclose(grad, 2.0 * (z - 0.25) * np.array(slopes), rtol=1e-13)


def test_alpha_at_infinite_rewards() -> None:
    inf = np.inf
    options: dict[str, Any] = {"alpha": 1.0, "reduction": "sum"}
    # exp(1000) overflows.
    for chosen, rejected, loss, slopes in (
        (-1.0, -1000.0, 0.0, [0.0, 0.0]),
        (-1000.0, -1.0, inf, [-inf, 2.0 * math.e]),
        (-1000.0, -1000.0, np.nan, [np.nan, np.nan]),
    ):
        values, valid = np.array([[chosen], [rejected]]), np.ones((2, 1), bool)
        np.testing.assert_array_equal(_two(chosen, rejected, **options).loss, loss)
        grad = oracle.preference_grad(values, valid, **options)[:, 0]
        np.testing.assert_array_equal(grad, slopes)
    for alpha, reward in ((-0.5, -2.0), (0.5, -inf)):
        assert _two(-inf, -1.0, alpha=alpha, beta=1.0).chosen_rewards == reward


def test_ipo_and_the_default_margin_of_each_loss() -> None:
    assert _two(-1.0, -2.0, loss_type="ipo", beta=2.0).loss == (1.0 - 0.25) ** 2
    explicit = _two(-1.0, -2.0, loss_type="ipo", beta=2.0, gamma_beta_ratio=0.5)
    assert explicit.loss == (0.5 - 0.25) ** 2
    assert _two(-1.0, -2.0, loss_type="hinge", beta=1.0).loss == 0.5


def _pack(rows: Array, lengths: Any, fill: float) -> tuple[Array, Array]:
    """Packs the first lengths[s] positions of each row, with filled padding before and after."""
    edge = np.full((2, *rows.shape[2:]), fill, dtype=rows.dtype)
    parts = [edge, *(row[:length] for row, length in zip(rows, lengths, strict=True)), edge[:1]]
    return np.concatenate(parts), 2 + np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
def test_packed_sequences_equal_padded_rows(scoring: dict[str, Any], shape: Any) -> None:
    logits, labels = batch()
    lengths = [6, 0, 4, 6, 1, 3]
    for s, length in enumerate(lengths):
        labels[s, length:] = IGNORE
    options = {**scoring, "pairs": SHARED, "sft_weight": 0.3, "sft_reduction": "token"}
    want, want_grad = oracle.simpo_loss(logits, labels, **options)
    packed, cu = _pack(logits, lengths, np.nan)
    packed_labels, _ = _pack(labels, lengths, V + 7)
    options["cu_seqlens"] = cu
    result, grad = oracle.simpo_loss(
        packed.reshape(*shape, V), packed_labels.reshape(shape), **options
    )
    assert result.metrics == want.metrics
    np.testing.assert_array_equal(result.loss, want.loss)
    np.testing.assert_array_equal(result.losses, want.losses)
    assert grad.shape == (*packed_labels.reshape(shape).shape, V)
    np.testing.assert_array_equal(grad.reshape(-1, V), _pack(want_grad, lengths, 0.0)[0])


@pytest.mark.parametrize("cu_seqlens", [[], [0, 7], [-1, 3], [0, 4, 3]])
def test_invalid_boundaries_are_refused(cu_seqlens: Any) -> None:
    with pytest.raises(ValueError, match="do not divide 6"):
        oracle.token_logps(np.zeros((6, V)), [0] * 6, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("sequence", [-1, 6])
def test_pairs_of_missing_sequences_are_refused(sequence: int) -> None:
    with pytest.raises(IndexError, match=r"pair \[1, 0\] is of sequence"):
        oracle.simpo_loss(*batch(), pairs=[[0, 1], [sequence, 2]])


@pytest.mark.parametrize("name", ["losses", "chosen_logps", "rejected_logps", "sft_loss"])
@pytest.mark.parametrize("options", [
    {}, {"sft_reduction": "token"}, {"reduction": "none"}, {"average_log_prob": False, "alpha": 0.3}
])  # fmt: skip
def test_gradients_of_the_other_results_by_central_differences(
    options: dict[str, Any], name: str
) -> None:
    logits, labels = batch()
    labels[5] = IGNORE  # Drops a pair, whose chosen_logps still have a gradient.
    logps, _, valid = oracle.token_logps(logits, labels)
    options = {"sft_weight": 0.4, "pairs": SHARED, "pair_weight": WEIGHTS, **options}
    of_pairs = name != "sft_loss" or options.get("reduction") == "none"
    weights: Any = np.array([0.5, -2.0, 1.5]) if of_pairs else -0.7

    def weighted(x: Array) -> float:
        return float(
            np.nansum(weights * getattr(oracle.preference_loss(x, valid, **options), name))
        )

    grads = {"grad_loss": 0.0, f"grad_{name}": weights}
    actual = oracle.preference_grad(logps, valid, **grads, **options)
    np.testing.assert_allclose(actual, central_differences(weighted, logps), rtol=1e-7, atol=1e-9)
    # Gradients of several results add up.
    both = oracle.preference_grad(logps, valid, **{**grads, "grad_loss": 1.0}, **options)
    alone = oracle.preference_grad(logps, valid, **options)
    np.testing.assert_allclose(both, actual + alone, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("empty", ["drop", "nan"])
@pytest.mark.parametrize("options", [
    {}, {"sft_weight": 0.3}, {"sft_weight": 0.3, "sft_reduction": "token"}, {"reduction": "none"},
])  # fmt: skip
def test_weight_zero_drops_a_pair_and_keeps_the_denominators(
    options: dict[str, Any], empty: str
) -> None:
    logits, labels = batch()
    logits[[1, P + 1]] = np.nan
    weight = np.array([2.0, 0.0, -1.0])
    keep = [0, 2, P, P + 2]
    result, grad = oracle.simpo_loss(logits, labels, pair_weight=weight, empty=empty, **options)
    if "reduction" not in options:
        tokens = int((labels[:P, 1:] != IGNORE).sum())
        options = {**options, "normalizer": (float(P), float(tokens))}
    want, want_grad = oracle.simpo_loss(
        logits[keep], labels[keep], pair_weight=weight[[0, 2]], empty=empty, **options
    )
    total = result.loss[[0, 2]] if result.loss.ndim else result.loss
    np.testing.assert_allclose(total, want.loss, rtol=1e-14)
    np.testing.assert_allclose(grad[keep], want_grad, rtol=1e-14, atol=1e-300)
    assert not grad[[1, P + 1]].any()
    assert result.losses[1] == 0.0
    assert result.metrics["num_pairs"] == P and math.isnan(result.metrics["logps/chosen"])


def test_count_pairs() -> None:
    _, labels = batch()
    labels[3] = labels[1, 1:] = IGNORE
    labels[1, 0] = 2  # The shift does not score the first column.
    assert oracle.count_pairs(labels) == (1, 3)
    assert oracle.count_pairs(labels, empty="nan") == (3, 8)
    assert oracle.count_pairs(labels, shift=False) == (2, 1 + 3)
    assert oracle.count_pairs(labels, pairs=[[0, 2], [0, 5], [0, 1], [3, 2], [4, 0]]) == (3, 13)
    flat, cu = _pack(labels, [6, 6, 2, 0, 6, 6], 5)
    assert oracle.count_pairs(flat, cu_seqlens=cu, pairs=[[2, 0], [3, 5]]) == (1, 1)
    assert oracle.count_pairs(labels[:0]) == (0, 0)
