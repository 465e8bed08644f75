"""token_logps and sequence_logps: values and gradients against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import simpo_ext
from support import oracle
from support.batches import DTYPES, Batch, eager_token_logps, make_batch

pytestmark = pytest.mark.kernels

# 1: a softmax of one. 7: less than a vector. 1023 to 1025: whole steps of vectors, with and without
# a tail. 5003: several steps and an odd tail. 8193: a block and a tail.
VOCABULARIES = (1, 7, 1023, 1024, 1025, 5003, 8193)

# An error may be twice that of the eager computation, or this floor. Half an ulp of float32 is 1e-6
# for values up to 32, and a sum of exps adds about as much.
FLOOR = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# Gradients are at most 1, so their floor is a few ulp of 1 in the compute dtype.
GRADIENT_FLOOR = {
    torch.float64: 1e-15,
    torch.float32: 2e-7,
    torch.bfloat16: 2e-7,
    torch.float16: 2e-7,
}


def max_error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item()


def gradients(batch: Batch, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of token_logps and of the eager computation."""
    results = []
    for function in (simpo_ext.token_logps, eager_token_logps):
        leaf = batch.logits.clone().requires_grad_()
        logps = function(leaf, batch.labels)
        logps.backward(upstream[:, : logps.shape[1]].to(logps.dtype))
        results.append(leaf.grad)
    return results[0], results[1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_at_least_as_exact_as_eager(dtype: torch.dtype, vocabulary: int) -> None:
    batch = make_batch(vocabulary=vocabulary, dtype=dtype)
    expected, _, valid = oracle.token_logps(batch.logits.double().numpy(), batch.labels.numpy())
    truth = torch.from_numpy(expected)
    logps = simpo_ext.token_logps(*batch)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logps.shape == batch.labels.shape
    assert (logps[~torch.from_numpy(valid)] == 0).all()
    eager_error = max_error(eager_token_logps(*batch), truth[:, :-1])
    assert max_error(logps, truth) <= max(2 * eager_error, FLOOR[dtype])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_at_least_as_exact_as_eager(dtype: torch.dtype, vocabulary: int) -> None:
    batch = make_batch(vocabulary=vocabulary, dtype=dtype)
    upstream = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1))
    truth = torch.from_numpy(
        oracle.token_logps_grad(
            upstream.double().numpy(), batch.logits.double().numpy(), batch.labels.numpy()
        )
    )
    ours, eager = gradients(batch, upstream)
    assert ours.dtype == dtype
    assert max_error(ours, truth) <= max(2 * max_error(eager, truth), GRADIENT_FLOOR[dtype])


@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [
        (torch.float32, -300.0, 1e-6),
        (torch.float32, 300.0, 1e-6),
        (torch.float32, 1e5, 1e-6),
        (torch.float64, 1e6, 1e-14),
    ],
)
def test_a_common_offset_of_the_logits_costs_no_accuracy(
    dtype: torch.dtype, offset: float, tolerance: float
) -> None:
    # A common offset cancels. The tensors saved for the backward must not bring it back.
    batch = make_batch(vocabulary=1000, dtype=dtype, offset=offset)
    upstream = torch.ones(batch.labels.shape)
    args = batch.logits.double().numpy(), batch.labels.numpy()
    ours, _ = gradients(batch, upstream)
    truth = torch.from_numpy(oracle.token_logps_grad(upstream.double().numpy(), *args))
    assert max_error(ours, truth) < tolerance
    expected, _, _ = oracle.token_logps(*args)
    assert max_error(simpo_ext.token_logps(*batch), torch.from_numpy(expected)) < tolerance


@pytest.mark.parametrize("flatness", [0.0, 0.01, 1.0])
def test_a_flat_distribution_over_a_large_vocabulary_is_exact(flatness: float) -> None:
    # A running float32 sum of 262144 terms of equal size would drift.
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 2, 262144, generator=generator) * flatness
    labels = torch.zeros(2, 2, dtype=torch.int64)
    expected, _, _ = oracle.token_logps(logits.double().numpy(), labels.numpy())
    assert max_error(simpo_ext.token_logps(logits, labels), torch.from_numpy(expected)) < 1e-6


@pytest.mark.parametrize("options", [{"logit_scale": 0.25}, {"softcap": 8.0}])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_match_the_oracle(
    dtype: torch.dtype, shift: bool, options: dict[str, float]
) -> None:
    batch = make_batch(vocabulary=1300, dtype=dtype)
    args = batch.logits.double().numpy(), batch.labels.numpy()
    leaf = batch.logits.clone().requires_grad_()
    logps = simpo_ext.token_logps(leaf, batch.labels, shift=shift, **options)
    expected, _, _ = oracle.token_logps(*args, shift=shift, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert max_error(logps.detach(), torch.from_numpy(expected)) < tolerance
    upstream = torch.rand(logps.shape, generator=torch.Generator().manual_seed(1)).to(logps.dtype)
    logps.backward(upstream)
    truth = oracle.token_logps_grad(upstream.double().numpy(), *args, shift=shift, **options)
    # Entries of at most 1 are rounded once to the logits' dtype.
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert max_error(leaf.grad, torch.from_numpy(truth)) < rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_backward_gives_the_same_bits_in_the_logits_memory(dtype: torch.dtype) -> None:
    batch = make_batch(vocabulary=1025, dtype=dtype)
    leaf = batch.logits.clone().requires_grad_()
    simpo_ext.token_logps(leaf, batch.labels).sum().backward()
    other = batch.logits.clone().requires_grad_()
    logits = other * 1
    simpo_ext.token_logps(logits, batch.labels, inplace_backward=True).sum().backward()
    assert torch.equal(other.grad, leaf.grad)
    assert torch.equal(logits.detach(), leaf.grad)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_logps_match_the_oracle(dtype: torch.dtype, average: bool) -> None:
    batch = make_batch(pairs=3, time=40, vocabulary=90, dtype=dtype)
    odd = Batch(batch.logits[:5], batch.labels[:5])  # Sequences need no pairs.
    logps = simpo_ext.sequence_logps(*odd, average_log_prob=average)
    per_token, _, valid = oracle.token_logps(odd.logits.double().numpy(), odd.labels.numpy())
    expected, _ = oracle.sequence_logps(per_token, valid, average_log_prob=average)
    tolerance = 1e-14 if dtype == torch.float64 else 4e-7
    error = (logps.double() - torch.from_numpy(expected)) / torch.from_numpy(expected)
    assert error.abs().max() < tolerance


def test_the_sum_over_a_long_sequence_is_exact() -> None:
    # A running float32 sum of 20000 terms near -3 would be off by about 1e-5 relative.
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 20000, 4, generator=generator) * 3
    labels = torch.randint(4, (1, 20000), generator=generator)
    total = simpo_ext.sequence_logps(logits, labels, average_log_prob=False)
    truth = simpo_ext.token_logps(logits, labels).double().sum(1)
    assert abs((total.double() - truth) / truth).item() <= 6e-8  # half an ulp


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_block_of_minus_infinity_leaves_the_rest_exact(dtype: torch.dtype) -> None:
    # Whole blocks of -inf come before the first finite logit.
    batch = make_batch(vocabulary=5003, dtype=dtype)
    batch.logits[:, :, :2500] = float("-inf")
    batch.labels[batch.labels >= 0] %= 2500
    batch.labels[batch.labels >= 0] += 2500
    upstream = torch.ones(batch.labels.shape)
    args = batch.logits.double().numpy(), batch.labels.numpy()
    expected, _, _ = oracle.token_logps(*args)
    ours, _ = gradients(batch, upstream)
    truth = oracle.token_logps_grad(upstream.double().numpy(), *args)
    assert max_error(simpo_ext.token_logps(*batch), torch.from_numpy(expected)) < 2e-6
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert max_error(ours, torch.from_numpy(truth)) < rounding


def test_small_probabilities_keep_their_digits() -> None:
    # Relative errors of probabilities down to 1e-30: an exp that underflows early fails.
    logits = torch.linspace(-68.0, 0.0, 1500).expand(1, 1, 1500).contiguous().requires_grad_()
    labels = torch.full((1, 1), 1499)
    simpo_ext.token_logps(logits, labels, shift=False).backward(torch.ones(1, 1))
    truth = torch.from_numpy(
        oracle.token_logps_grad(
            [[1.0]], logits.detach().double().numpy(), labels.numpy(), shift=False
        )
    )
    # Rounding the argument -68 to float32 changes exp by a factor of up to 1 + 68 * 2^-24.
    assert ((logits.grad.double() - truth) / truth).abs().max() < 68 * 2.0**-24 + 2e-7


def test_the_label_s_gradient_keeps_its_digits_where_the_model_is_sure() -> None:
    logits = torch.zeros(1, 1, 100, dtype=torch.float64)
    logits[0, 0, 7] = 30.0
    logits.requires_grad_()
    labels = torch.full((1, 1), 7)
    upstream = torch.ones(1, 1, dtype=torch.float64)
    simpo_ext.token_logps(logits, labels, shift=False).backward(upstream)
    others = 99 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    # 1 - softmax is 9.3e-12. Computed as 1 - exp(logp), it would have five digits.
    assert abs(logits.grad[0, 0, 7] / (others / (1 + others)) - 1).item() < 1e-4


# The largest logit comes first. The sum must not lose the small terms that follow.
@pytest.mark.parametrize("vocabulary", [32768, 131072, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_label_keeps_the_digits_of_its_gradient(dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, 3, vocabulary, generator=generator).to(dtype)
    logits[0, :, 0] = torch.tensor([14.0, 16.0, 19.0], dtype=dtype)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    logps = simpo_ext.token_logps(logits.requires_grad_(), labels, shift=False)
    logps.sum().backward()
    assert logits.grad is not None
    expected, _, _ = oracle.token_logps(
        logits.detach().double().numpy(), labels.numpy(), shift=False
    )
    truth = torch.from_numpy(expected)
    assert (logps.detach().double() - truth).abs().max() < 5e-7
    if dtype == torch.float32:
        one_minus_p = -torch.expm1(truth)
        # In float32, the label's term is added only to those of its own lane or batch.
        bound = 32 / vocabulary + 1e-5
        assert ((logits.grad[..., 0].double() - one_minus_p) / one_minus_p).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sequence_op_takes_strides_and_sums_exactly(
    dtype: torch.dtype,
) -> None:
    token_logps = torch.tensor([[1e16, 5.0], [1.0, 6.0], [-1e16, 7.0]], dtype=dtype).t()
    assert token_logps.stride() == (1, 2)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    op = torch.ops.simpo_ext.sequence_logps
    logps, counts = op(token_logps, labels, None, -100, False, False)
    assert logps.tolist() == [1.0, 18.0]
    assert counts.tolist() == [3, 3]
