"""The candidates: this project's functions, the eager formulas, and those of other packages.

All do the same work. ``token_logps``: the log-probability of each label, 0 where it is masked, and
the gradient of the logits for a given gradient of each log-probability. ``simpo_loss``: the same
through the SimPO loss of the pairs. Losses that are negative log-probabilities are negated.

A package is imported when its candidate is first asked for, and whatever is wrong with it makes
that candidate unavailable, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import simpo_ext
from bench import reference
from bench.workload import IGNORE_INDEX

Forward = Callable[[Tensor, Tensor], Tensor]  # logits [B, T, V], labels [B, T] -> [B, T] or []


class UnusableError(Exception):
    """A candidate that is not the same work, or cannot run here."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to do the work."""

    name: str
    work: str  # "token_logps" or "simpo_loss"
    load: Callable[[], Forward]
    needs_cuda: bool = False
    is_ours: bool = False

    @cached_property
    def _loaded(self) -> tuple[Forward | None, str]:
        try:
            return self.load(), ""
        except UnusableError as error:
            return None, str(error)
        except Exception as error:  # of a foreign package's import, whatever it is
            return None, f"{type(error).__name__}: {error}"

    def available(self, device: torch.device) -> tuple[bool, str]:
        """Whether it can run on the device, and why not."""
        if self.needs_cuda and device.type != "cuda":
            return False, f"needs a CUDA device, not {device.type}"
        forward, reason = self._loaded
        return forward is not None, reason

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [B, T], or the loss []."""
        forward, reason = self._loaded
        if forward is None:
            raise UnusableError(reason)
        return forward(logits, labels)

    def backward(self, output: Tensor, logits: Tensor, upstream: Tensor) -> Tensor:
        """The gradient of the logits; upstream [B, T] is of the log-probabilities."""
        grad_output = upstream.to(output.dtype) if self.work == "token_logps" else None
        (gradient,) = torch.autograd.grad(output, logits, grad_output)
        return gradient


# ---- this project ----------------------------------------------------------------------------


def _simpo_ext_token_logps(inplace: bool, softcap: float | None) -> Forward:
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return simpo_ext.token_logps(
            logits, labels, shift=False, softcap=softcap, inplace_backward=inplace
        )

    return forward


def _simpo_ext_loss(inplace: bool) -> Forward:
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return simpo_ext.simpo_loss(
            logits,
            labels,
            beta=reference.BETA,
            gamma_beta_ratio=reference.GAMMA_BETA_RATIO,
            shift=False,
            inplace_backward=inplace,
        ).loss

    return forward


# ---- PyTorch ---------------------------------------------------------------------------------


def eager_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula as trainers write it, in float32."""
    logps = logits.float().log_softmax(-1)
    label_logps = logps.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return label_logps.masked_fill(labels == IGNORE_INDEX, 0.0)


def eager_simpo_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The SimPO loss of the eager log-probabilities."""
    return reference.simpo_loss(eager_token_logps(logits, labels), labels)


def _compiled(function: Forward) -> Forward:
    return torch.compile(function, dynamic=False)


def _per_token(cross_entropy: Callable[..., Tensor]) -> Forward:
    """Of a function with the arguments of PyTorch's cross entropy."""

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        return -losses.view(labels.shape)

    return forward


# ---- other packages --------------------------------------------------------------------------


def _liger() -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _per_token(liger_cross_entropy)


def _quack() -> Forward:
    from quack.cross_entropy import cross_entropy

    return _per_token(cross_entropy)


def _trl() -> Forward:
    from trl.trainer.utils import selective_log_softmax

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        label_logps = selective_log_softmax(logits, labels.clamp(min=0))
        return label_logps.masked_fill(labels == IGNORE_INDEX, 0.0)

    return forward


def _cut_cross_entropy() -> Forward:
    raise UnusableError(
        "not the same work: it takes hidden states and a classifier, never logits, so its time is "
        "that of the matrix products too"
    )


def our_token_logps(softcap: float | None = None) -> list[Candidate]:
    """This project's candidates: out of place and in place."""

    def ours(name: str, inplace: bool) -> Candidate:
        load = partial(_simpo_ext_token_logps, inplace, softcap)
        return Candidate(name, "token_logps", load, is_ours=True)

    return [ours("simpo_ext", False), ours("simpo_ext in place", True)]


def candidates() -> list[Candidate]:
    """All of them, this project's first."""
    token_logps, loss = "token_logps", "simpo_loss"
    return [
        *our_token_logps(),
        Candidate("eager float32", token_logps, lambda: eager_token_logps),
        Candidate("torch.compile", token_logps, lambda: _compiled(eager_token_logps)),
        Candidate("F.cross_entropy", token_logps, lambda: _per_token(F.cross_entropy)),
        Candidate("Liger cross entropy", token_logps, _liger, needs_cuda=True),
        Candidate("quack cross_entropy", token_logps, _quack, needs_cuda=True),
        Candidate("TRL selective_log_softmax", token_logps, _trl),
        Candidate("cut-cross-entropy", token_logps, _cut_cross_entropy),
        Candidate("simpo_ext loss", loss, lambda: _simpo_ext_loss(False), is_ours=True),
        Candidate("simpo_ext loss in place", loss, lambda: _simpo_ext_loss(True), is_ours=True),
        Candidate("eager float32 loss", loss, lambda: eager_simpo_loss),
        Candidate("torch.compile loss", loss, lambda: _compiled(eager_simpo_loss)),
    ]
