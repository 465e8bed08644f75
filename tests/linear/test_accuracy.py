"""The accuracy rule in bfloat16, for any number of chunks of the vocabulary.

The relative errors of the gradients of hidden states and weight are at most 1.1 times those of the
dense eager computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simpo_ext import linear_simpo_loss, linear_token_logps
from support import linear_oracle
from support.linear_batches import CHUNK, LinearBatch, dense_logps, logps_and_gradients, upstream_of

pytestmark = pytest.mark.kernels

PAIRS, T, H = 2, 64, 64  # 256 rows; at most 252 are scored
RULE = 1.1


def trained_like(vocabulary: int, heights: tuple[float, float], wrong: float) -> LinearBatch:
    """Hidden states along the weight row of their label, or of another token for a share ``wrong``.

    The logit of that token lies between the two heights. The other logits have variance 1, so a
    height of log V + 1/2 means a probability of one half.
    """
    generator = torch.Generator().manual_seed(vocabulary)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(vocabulary, H, **options)
    weight /= weight.norm(dim=1, keepdim=True)
    labels = torch.randint(vocabulary, (2 * PAIRS, T), generator=generator)
    tokens = torch.randint(vocabulary, labels.shape, generator=generator)
    right = torch.rand(labels.shape, **options) >= wrong
    tokens[:, :-1] = labels[:, 1:].where(right[:, :-1], tokens[:, :-1])
    low, high = heights
    height = low + (high - low) * torch.rand(*labels.shape, 1, **options)
    hidden = torch.randn(2 * PAIRS, T, H, **options) + height * weight[tokens]
    labels[0, :9] = labels[1, :2] = labels[2, 50:] = labels[3, :20] = -100
    return LinearBatch(hidden.bfloat16(), weight.bfloat16(), labels, None)


# flat: every probability is near 1 / V. peaked: most labels are sure, and a quarter of the rows are
# sure of a wrong token. sure: every label's 1 - p is so small that bfloat16 rounds p to 1.
BATCHES: dict[str, Callable[[int], LinearBatch]] = {
    "flat": lambda vocabulary: trained_like(vocabulary, (0.0, 0.0), 1.0),
    "peaked": lambda vocabulary: trained_like(vocabulary, (8.0, 24.0), 0.25),
    "sure": lambda vocabulary: trained_like(vocabulary, (16.0, 20.0), 0.0),
}


def preference_of(logps: Tensor, labels: Tensor) -> Tensor:
    """The formula of the SimPO loss with beta 2 and gamma_beta_ratio 0.5."""
    means = logps.sum(1) / (labels[:, 1:] != -100).sum(1)
    margins = means[:PAIRS] - means[PAIRS:] - 0.5
    return -torch.nn.functional.logsigmoid(2.0 * margins).mean()


def errors(results: list[Tensor | None], truth: list[Tensor]) -> list[float]:
    """Relative errors of the gradients of hidden and weight in the Frobenius norm."""
    return [
        ((got.double() - want).norm() / want.norm()).item()
        for got, want in zip(results[1:3], truth, strict=True)
        if got is not None
    ]


def check_rule(ours: list[float], eager: list[float]) -> None:
    assert len(ours) == len(eager) == 2
    for name, error, bound in zip(("hidden", "weight"), ours, eager, strict=True):
        assert 0 < error <= RULE * bound, name


def true_gradients(upstream: Tensor, batch: LinearBatch) -> list[Tensor]:
    """The gradients of hidden and weight in float64. The oracle's formulas, but fast for any V."""
    hidden, weight = batch.hidden.double(), batch.weight.double()
    targets = torch.full_like(batch.labels, -100)
    targets[:, :-1] = batch.labels[:, 1:]
    valid = targets >= 0
    rows = hidden[valid]
    dlogits = (rows @ weight.t()).softmax(1).neg_()
    at = torch.arange(len(rows)), targets[valid]
    # 1 - p is the sum of the others' p, which does not cancel.
    dlogits[at] = 0.0
    dlogits[at] = -dlogits.sum(1)
    dlogits *= upstream[valid].double()[:, None]
    dhidden = torch.zeros_like(hidden)
    dhidden[valid] = dlogits @ weight
    return [dhidden, dlogits.t() @ rows]


def test_true_gradients_match_the_oracle() -> None:
    batch = BATCHES["sure"](500)
    upstream = upstream_of(batch.labels)
    want = linear_oracle.linear_token_logps_grad(upstream.numpy(), *batch.doubles())
    got = true_gradients(upstream, batch)
    assert max(errors([None, *got], [torch.from_numpy(x) for x in want[:2]])) < 1e-12


def test_the_batches_have_the_stated_probabilities() -> None:
    for chunks in (1, 32):
        scored = {
            name: dense_logps(*batch[:3])[:, :-1][batch.labels[:, 1:] >= 0].exp()
            for name, batch in ((name, make(chunks * CHUNK)) for name, make in BATCHES.items())
        }
        assert scored["flat"].max() < 0.02
        assert (scored["peaked"] > 0.9).float().mean() > 0.3
        assert (scored["peaked"] < 1e-3).float().mean() > 0.15
        assert 1e-4 < (1 - scored["sure"]).mean() < 0.1


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    "chunks",
    [1, pytest.param(4, marks=pytest.mark.cpu_only), pytest.param(32, marks=pytest.mark.cpu_only)],
)
def test_gradients_of_the_log_probabilities_keep_to_the_rule(chunks: int, name: str) -> None:
    batch = BATCHES[name](chunks * CHUNK)
    truth = true_gradients(upstream_of(batch.labels).float(), batch)
    eager = logps_and_gradients(dense_logps, batch)
    ours = logps_and_gradients(linear_token_logps, batch, logits_budget_bytes=0)
    check_rule(errors(ours, truth), errors(eager, truth))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("chunks", [1, pytest.param(4, marks=pytest.mark.cpu_only)])
def test_gradients_of_the_loss_keep_to_the_rule(chunks: int, name: str) -> None:
    batch = BATCHES[name](chunks * CHUNK)
    double = LinearBatch(batch.hidden.double(), batch.weight.double(), batch.labels, None)
    logps = dense_logps(*double[:3]).requires_grad_()
    (upstream,) = torch.autograd.grad(preference_of(logps, batch.labels), logps)
    truth = true_gradients(upstream, batch)

    results = []
    for loss in (
        lambda *args: linear_simpo_loss(*args).loss,
        lambda *args: preference_of(dense_logps(*args), args[2]),
    ):
        leaf = batch.leaves()
        results.append([None, *torch.autograd.grad(loss(*leaf[:3]), leaf.inputs())])
    ours, eager = results
    check_rule(errors(ours, truth), errors(eager, truth))
