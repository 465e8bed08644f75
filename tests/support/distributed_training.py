"""A small causal transformer, and its training on preference pairs in one or more processes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import simpo_ext
from simpo_ext import PairCounts, count_pairs
from simpo_ext.distributed.normalizer import global_normalizer

# The numbers of ranks do not divide the vocabulary and the width.
VOCABULARY = 203
WIDTH = 30
TIME = 14
STEPS = 20

# The numbers of pairs in the micro-batches of each rank.
Shares = Sequence[Sequence[int]]
PAIRS = 12
SHARES: dict[int, Shares] = {2: ((5, 3), (1, 3)), 4: ((3, 2), (1, 1), (2, 1), (1, 1))}
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence": {"sft_weight": 0.3},
    "token": {"sft_weight": 0.3, "sft_reduction": "token"},
}


class Pairs(NamedTuple):
    """Rows of tokens and labels, the chosen ones first."""

    tokens: Tensor  # [2P, T]
    labels: Tensor  # [2P, T]

    def part(self, first: int, count: int) -> Pairs:
        """Pairs first .. first + count - 1."""
        half = len(self.labels) // 2
        rows = torch.arange(first, first + count)
        rows = torch.cat((rows, half + rows))
        return Pairs(self.tokens[rows], self.labels[rows])

    def micro_batches(self, shares: Shares, rank: int) -> list[Pairs]:
        """The micro-batches of one rank."""
        first = sum(map(sum, shares[:rank]))
        parts = []
        for count in shares[rank]:
            parts.append(self.part(first, count))
            first += count
        return parts


def make_pairs(seed: int, dropped: Sequence[int] = (2, 6)) -> Pairs:
    """Chosen completions follow a rule. Each ``dropped`` pair lacks one completion."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2 * PAIRS, TIME), generator=generator)
    for position in range(1, TIME):
        tokens[:PAIRS, position] = (3 * tokens[:PAIRS, position - 1] + 1) % VOCABULARY
    labels = tokens.clone()
    for row in range(2 * PAIRS):
        labels[row, : 1 + row % 5] = -100
        labels[row, TIME - row % 4 :] = -100
    for pair in dropped:
        labels[pair + PAIRS * (pair % 2)] = -100
    return Pairs(tokens, labels)


def all_pairs_dropped(batch: Pairs) -> Pairs:
    return Pairs(batch.tokens, torch.full_like(batch.labels, -100))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, time, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, time, 3, 3, WIDTH // 3).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, time, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Computes hidden states, like a language model without its lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TIME, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LossHead(nn.Linear):
    """An lm_head whose forward computes the loss, so that FSDP gathers its weight before."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(WIDTH, VOCABULARY, bias=False)
        self.loss = loss

    def forward(self, hidden: Tensor, labels: Tensor, normalizer: Any) -> Tensor:
        if isinstance(self.loss, simpo_ext.LinearSimPOLoss):
            return self.loss(hidden, self.weight, labels, normalizer=normalizer).loss
        return self.loss(super().forward(hidden), labels, normalizer=normalizer).loss


class ModelWithLoss(nn.Module):
    """The module that DDP and FSDP wrap."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.head = LossHead(loss)
        # Whether forward unshards the head itself, and does not call the head's forward.
        self.unshards_head = False

    def forward(self, tokens: Tensor, labels: Tensor, normalizer: Any) -> Tensor:
        hidden = self.decoder(tokens)
        if not self.unshards_head:
            return self.head(hidden, labels, normalizer)
        self.head.unshard()
        return self.head.loss(hidden, self.head.weight, labels, normalizer=normalizer).loss


def make_model(
    loss: str = "plain", *, front_end: str = "linear", dtype: torch.dtype = torch.float64
) -> ModelWithLoss:
    torch.manual_seed(0)
    options = {"beta": 2.0, "gamma_beta_ratio": 0.25, **LOSSES[loss]}
    if front_end == "linear":  # The budget keeps a part of the logits.
        module = simpo_ext.LinearSimPOLoss(logits_budget_bytes=1 << 16, **options)
    else:
        module = simpo_ext.SimPOLoss(inplace_backward=front_end == "in place", **options)
    return ModelWithLoss(module).to(dtype)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam in float64, else SGD: Adam would scale up gradients that are rounding errors."""
    if next(model.parameters()).dtype == torch.float64:
        return torch.optim.AdamW(model.parameters(), lr=3e-3)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@contextlib.contextmanager
def synchronized(model: nn.Module, last: bool) -> Any:
    """Lets only the backward of the last micro-batch reduce the gradients over the ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def train(
    model: nn.Module, shares: Shares, batches: Sequence[Pairs], gradients: Any = "mean"
) -> list[float]:
    """Takes this rank's steps, and returns the loss of each whole batch."""
    optimizer = make_optimizer(model)
    losses = []
    for batch in batches:
        parts = batch.micro_batches(shares, dist.get_rank())
        losses.append(accumulate(model, parts, gradients))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def accumulate(model: nn.Module, parts: Sequence[Pairs], gradients: Any = "mean") -> float:
    """Accumulates the gradient of all ranks' micro-batches, and returns their loss."""
    normalizer = global_normalizer(
        [count_pairs(part.labels) for part in parts], gradients=gradients
    )
    total = torch.zeros((), dtype=torch.float64)
    for index, part in enumerate(parts):
        with synchronized(model, last=index == len(parts) - 1):
            loss = model(*part, normalizer)
            loss.backward()
            total += loss.detach()
    dist.all_reduce(total)
    return total.item() / (dist.get_world_size() if gradients == "mean" else 1)


def train_with_casts(
    model: nn.Module, shares: Shares, batches: Sequence[Pairs], dtype: torch.dtype
) -> list[float]:
    """Takes, in one process, the steps of ranks that compute in ``dtype`` and reduce in float32."""
    optimizer = make_optimizer(model)
    losses = []
    for batch in batches:
        pairs, tokens = (value.clamp(min=1.0) / len(shares) for value in count_pairs(batch.labels))
        reduced = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        total = 0.0
        for rank in range(len(shares)):
            for part in batch.micro_batches(shares, rank):
                low = {
                    name: value.detach().to(dtype).requires_grad_()
                    for name, value in model.named_parameters()
                }
                loss = torch.func.functional_call(model, low, (*part, PairCounts(pairs, tokens)))
                loss.backward()
                total += loss.item() / len(shares)
                for name, value in low.items():
                    reduced[name] += value.grad.float() / len(shares)
        for name, parameter in model.named_parameters():
            parameter.grad = reduced[name]
        optimizer.step()
        losses.append(total)
    return losses


def train_alone(model: nn.Module, batches: Sequence[Pairs]) -> list[float]:
    """Takes the steps in one process, each on the whole batch with the loss's own mean."""
    optimizer = make_optimizer(model)
    losses = []
    for batch in batches:
        loss = model(*batch, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered from their shards."""
    return {
        name.removeprefix("module."): whole(parameter.detach())
        for name, parameter in model.named_parameters()
    }


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
