"""Gradient accumulation, DDP and FSDP2 take the steps of one process on the whole batch.

The default is float64, since only the order of summation differs and tolerances can be small.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import simpo_ext
from simpo_ext import count_pairs
from simpo_ext.distributed import global_normalizer
from support import distributed_training as training
from support.distributed_training import PAIRS, SHARES, STEPS, Pairs, make_model, make_pairs
from support.ranks import run_on_ranks

# The ranks' processes always run the CPU kernels.
pytestmark = pytest.mark.cpu_only

# Twenty steps differ by at most a tenth of this.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
FLOAT32_CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# FSDP shards the head together with the parameters outside the layers, or by itself.
SHARDINGS = ("root", "head")

Trained = tuple[dict[str, Tensor], list[float]]


def batches() -> list[Pairs]:
    """The last batch has no valid pair. In the one before, only the first rank has valid pairs."""
    result = [make_pairs(seed) for seed in range(STEPS - 2)]
    result.append(make_pairs(STEPS, dropped=range(4, PAIRS)))
    return [*result, training.all_pairs_dropped(make_pairs(STEPS + 1))]


def train_alone(loss: str, dtype: torch.dtype) -> Trained:
    model = make_model(loss, front_end="logits", dtype=dtype)
    losses = training.train_alone(model, batches())
    return training.parameters(model), losses


@cache
def trained_alone(loss: str, dtype: torch.dtype) -> Trained:
    """Trains in a process with one thread. More threads slow these small operations down."""
    (result,) = run_on_ranks(1, train_alone, loss, dtype)
    return result


def assert_close(name: str, got: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}", **tolerance)


def assert_trained_as_alone(results: list[Trained], loss: str, dtype: torch.dtype) -> None:
    expected, expected_losses = trained_alone(loss, dtype)
    start = training.parameters(make_model(loss, dtype=dtype))
    tolerance = CLOSE if dtype == torch.float64 else FLOAT32_CLOSE
    for got, losses in results:
        assert got.keys() == expected.keys()
        for name, parameter in expected.items():
            assert not torch.allclose(parameter, start[name], rtol=1e-3), f"{name} is not trained"
            assert_close(name, got[name], parameter, **tolerance)
        assert losses == pytest.approx(expected_losses, rel=tolerance["rtol"])
        assert losses[-1] == 0.0


def train_ddp(loss: str, front_end: str, dtype: torch.dtype) -> Trained:
    model = DistributedDataParallel(make_model(loss, front_end=front_end, dtype=dtype))
    losses = training.train(model, SHARES[dist.get_world_size()], batches())
    return training.parameters(model), losses


@pytest.mark.parametrize(
    ("world_size", "loss", "front_end", "dtype"),
    [
        (2, "plain", "linear", torch.float64),
        (2, "token", "linear", torch.float64),
        (2, "sequence", "logits", torch.float64),
        (2, "token", "in place", torch.float64),
        (2, "token", "linear", torch.float32),
        (4, "token", "linear", torch.float64),
        (4, "sequence", "in place", torch.float64),
    ],
)
def test_ddp_trains_as_one_process_does(
    world_size: int, loss: str, front_end: str, dtype: torch.dtype
) -> None:
    results = run_on_ranks(world_size, train_ddp, loss, front_end, dtype)
    assert_trained_as_alone(results, loss, dtype)


def shard(model: training.ModelWithLoss, sharding: str, **options: Any) -> nn.Module:
    for layer in model.decoder.layers:
        fully_shard(layer, **options)
    if sharding != "root":
        fully_shard(model.head, **options)
        model.unshards_head = sharding == "head by hand"
    return fully_shard(model, **options)


def train_fsdp(
    loss: str, front_end: str, sharding: str, dtype: torch.dtype, gradients: str
) -> Trained:
    model = shard(make_model(loss, front_end=front_end, dtype=dtype), sharding)
    if gradients == "sum":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
    losses = training.train(model, SHARES[dist.get_world_size()], batches(), gradients)
    return training.parameters(model), losses


@pytest.mark.parametrize(
    ("world_size", "loss", "front_end", "sharding", "dtype", "gradients"),
    [
        (2, "token", "linear", "root", torch.float64, "mean"),
        (2, "token", "linear", "head", torch.float64, "mean"),
        (2, "sequence", "linear", "head by hand", torch.float64, "mean"),
        (2, "token", "in place", "head", torch.float64, "sum"),
        (2, "token", "linear", "root", torch.float32, "mean"),
        (4, "plain", "linear", "root", torch.float64, "sum"),
        (4, "token", "linear", "head", torch.float64, "mean"),
    ],
)
def test_fsdp_trains_as_one_process_does(
    world_size: int, loss: str, front_end: str, sharding: str, dtype: torch.dtype, gradients: str
) -> None:
    results = run_on_ranks(world_size, train_fsdp, loss, front_end, sharding, dtype, gradients)
    assert_trained_as_alone(results, loss, dtype)


def train_fsdp_in_bfloat16(sharding: str) -> Trained:
    # A cast of forward's inputs would round the normalizer.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    model = shard(make_model("token", dtype=torch.float32), sharding, mp_policy=policy)
    losses = training.train(model, SHARES[dist.get_world_size()], steps_in_bfloat16())
    return training.parameters(model), losses


def steps_in_bfloat16() -> list[Pairs]:
    """Ten epochs of two batches, which lower the loss."""
    return [make_pairs(seed % 2) for seed in range(STEPS)]


def train_alone_with_casts() -> Trained:
    model = make_model("token", dtype=torch.float32)
    losses = training.train_with_casts(model, SHARES[2], steps_in_bfloat16(), torch.bfloat16)
    return training.parameters(model), losses


@cache
def trained_alone_with_casts() -> Trained:
    (result,) = run_on_ranks(1, train_alone_with_casts)
    return result


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_fsdp_in_bfloat16_trains_as_one_process_with_the_same_casts(sharding: str) -> None:
    start = training.parameters(make_model("token", dtype=torch.float32))
    expected, losses = trained_alone_with_casts()
    assert losses[-1] < 0.8 * losses[0]
    for got, got_losses in run_on_ranks(2, train_fsdp_in_bfloat16, sharding):
        assert got_losses == pytest.approx(losses, rel=1e-3)
        for name, parameter in expected.items():
            # Relative to the change of the parameter: about five units in bfloat16's last place.
            way = (parameter - start[name]).norm()
            assert (got[name] - parameter).norm() <= 0.02 * way, name


class Collectives(TorchDispatchMode):
    """Records the name of each collective and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.calls.append((func._opname, sum(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


class CrossEntropy(nn.Module):
    """The usual loss of the logits of an lm_head."""

    def forward(self, logits: Tensor, labels: Tensor, *, normalizer: Any) -> Any:
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].mT, labels[:, 1:]))


def collectives_of_a_step(sharding: str, front_end: str) -> list[tuple[str, int]]:
    model = make_model(front_end="linear")
    if front_end == "cross entropy":
        model.head.loss = CrossEntropy()
    model = shard(model, sharding)
    batch = make_pairs(0)
    model(*batch, None).backward()  # The first step also initializes FSDP.
    with Collectives() as collectives:
        model(*batch, None).backward()
    return collectives.calls


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_collectives_are_those_of_a_cross_entropy(sharding: str) -> None:
    expected = run_on_ranks(2, collectives_of_a_step, sharding, "cross entropy")
    assert {"_allgather_base_", "_reduce_scatter_base_"} <= {name for name, _ in expected[0]}
    assert run_on_ranks(2, collectives_of_a_step, sharding, "linear") == expected


def wrap(model: training.ModelWithLoss, wrapper: str) -> nn.Module:
    return DistributedDataParallel(model) if wrapper == "ddp" else shard(model, wrapper)


def gradients_with_labels_masked(
    wrapper: str, front_end: str, masked_ranks: list[int]
) -> tuple[dict[str, Tensor], float]:
    model = wrap(make_model("token", front_end=front_end), wrapper)
    rank = dist.get_rank()
    parts = make_pairs(0).micro_batches(SHARES[dist.get_world_size()], rank)
    if rank in masked_ranks:
        parts = [training.all_pairs_dropped(part) for part in parts]
    loss = training.accumulate(model, parts)
    return training.gradients_of(model), loss


@pytest.mark.parametrize("front_end", ["linear", "in place"])
@pytest.mark.parametrize("wrapper", ["ddp", *SHARDINGS])
def test_a_rank_without_scored_tokens_neither_hangs_nor_counts(
    wrapper: str, front_end: str
) -> None:
    alone = make_model("token", front_end="logits")
    (rest,) = make_pairs(0).micro_batches(((sum(SHARES[2][0]),),), 0)
    expected = alone(*rest, None)
    expected.backward()
    for got, loss in run_on_ranks(2, gradients_with_labels_masked, wrapper, front_end, [1]):
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(got, training.gradients_of(alone), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("wrapper", ["ddp", *SHARDINGS])
def test_a_step_without_scored_tokens_has_gradient_zero(wrapper: str) -> None:
    for got, loss in run_on_ranks(2, gradients_with_labels_masked, wrapper, "linear", [0, 1]):
        assert loss == 0.0
        assert all((gradient == 0.0).all() for gradient in got.values())


def refused_weight_of_fsdp() -> None:
    model = shard(make_model(), "root")
    batch = make_pairs(0)
    hidden = torch.zeros(*batch.tokens.shape, training.WIDTH, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"weight: .*DTensor"):
        simpo_ext.linear_simpo_loss(hidden, model.head.weight, batch.labels)


def test_a_weight_that_fsdp_has_not_gathered_is_refused() -> None:
    run_on_ranks(2, refused_weight_of_fsdp)


def refused_cast_of_the_normalizer() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_model("token", dtype=torch.float32), "root", mp_policy=policy)
    batch = make_pairs(0)
    normalizer = global_normalizer(count_pairs(batch.labels))
    with pytest.raises(TypeError, match=r"normalizer\[0\]: .*bfloat16"):
        model(*batch, normalizer)


def test_a_normalizer_that_fsdp_rounded_is_refused() -> None:
    run_on_ranks(2, refused_cast_of_the_normalizer)
