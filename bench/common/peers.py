"""The candidates from logits: this project's functions, the trainers' formulas, other packages.

Their work is SimPO's loss of the pairs from mean log-probabilities, on labels that are not shifted.
With an odd B, it is the negative mean over the sequences.

Each peer has the form that is fastest for it: ``F.cross_entropy`` on flattened logits rather than
on [B, V, T], and ``torch.compile`` of the float32 formula rather than of the one in bfloat16.

A package is imported when its candidate is first asked for. If that fails, the candidate is
unavailable, and the error is the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import simpo_ext
from bench.common.cases import IGNORE_INDEX, following
from bench.common.processes import first_line
from bench.common.reference import BETA, GAMMA_BETA_RATIO

Forward = Callable[..., Any]

OURS, OURS_INPLACE = "simpo_ext", "simpo_ext in place"
PRINCETON, PRINCETON_FLOAT32 = "Princeton", "Princeton float32"


class UnusableError(Exception):
    """A candidate that is not the same work, or cannot run here."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to do the work."""

    name: str
    work: str
    load: Callable[[], Forward]
    is_ours: bool = False
    needs_cuda: bool = False
    is_compiled: bool = False
    is_inplace: bool = False  # the backward overwrites the logits
    is_rounded: bool = False  # computes in the dtype of the logits, and not in float32

    @cached_property
    def _loaded(self) -> tuple[Forward | None, str]:
        try:
            return self.load(), ""
        except UnusableError as error:
            return None, str(error)
        except Exception as error:  # of a foreign package's import, whatever it is
            return None, first_line(error)

    def available(self, device: torch.device) -> tuple[bool, str]:
        """Whether it can run on the device, and why not."""
        if self.needs_cuda and device.type != "cuda":
            return False, f"needs a CUDA device, not {device.type}"
        forward, reason = self._loaded
        return forward is not None, reason

    def forward(self, *inputs: Any) -> Any:
        """The work on logits and labels, or on whatever the benchmark's inputs are."""
        forward, reason = self._loaded
        if forward is None:
            raise UnusableError(reason)
        return forward(*inputs)


# ---- the loss of sequences -------------------------------------------------------------------


def get_batch_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Princeton's: mean log-probability [B] of each sequence, in the dtype of the logits."""

    def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)

    return _mean_logps(logits, labels, label_logps)


def _mean_logps(
    logits: Tensor, labels: Tensor, label_logps: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    loss_mask = labels != IGNORE_INDEX
    labels[labels == IGNORE_INDEX] = 0
    return (label_logps(logits, labels) * loss_mask).sum(-1) / loss_mask.sum(-1)


def _get_batch_logps_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return get_batch_logps(logits.float(), labels)


def _cross_entropy_loss(cross_entropy: Callable[..., Tensor]) -> Forward:
    """The loss by a function with the arguments of PyTorch's cross entropy."""

    def batch_logps(logits: Tensor, labels: Tensor) -> Tensor:
        labels = following(labels)  # without a copy of the logits
        losses = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        return -losses.view(labels.shape).sum(-1) / (labels != IGNORE_INDEX).sum(-1)

    return _loss(batch_logps)


def pair_loss(averages: Tensor) -> Tensor:
    """The trainers' loss of mean log-probabilities [B]."""
    if averages.shape[0] % 2:
        return -averages.mean()
    chosen, rejected = averages.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO)).mean()


def _loss(batch_logps: Forward) -> Forward:
    return lambda logits, labels: pair_loss(batch_logps(logits, labels))


def _trl_loss() -> Forward:
    from trl.trainer.utils import selective_log_softmax

    return _loss(lambda logits, labels: _mean_logps(logits, labels, selective_log_softmax))


def _liger() -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _cross_entropy_loss(liger_cross_entropy)


def _quack() -> Forward:
    from quack.cross_entropy import cross_entropy

    return _cross_entropy_loss(cross_entropy)


def _our_loss(inplace: bool, softcap: float | None) -> Forward:
    options = {"inplace_backward": inplace, "softcap": softcap}

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[0] % 2:
            return -simpo_ext.sequence_logps(logits, labels, **options).mean()
        return simpo_ext.simpo_loss(
            logits, labels, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO, **options
        ).loss

    return forward


def loss_candidates(softcap: float | None = None) -> list[Candidate]:
    """All of them, this project's first; with a softcap, only this project's."""

    def made(name: str, load: Callable[[], Forward], **fields: bool) -> Candidate:
        return Candidate(name, "sequence_loss", load, **fields)

    def compiled(loss: Forward) -> Callable[[], Forward]:
        return lambda: torch.compile(loss, dynamic=False, fullgraph=True)

    rounded_cuda = {"is_rounded": True, "needs_cuda": True}
    ours = [
        made(OURS, partial(_our_loss, False, softcap), is_ours=True),
        made(OURS_INPLACE, partial(_our_loss, True, softcap), is_ours=True, is_inplace=True),
    ]
    cross_entropy = _cross_entropy_loss(F.cross_entropy)
    peers = [
        made(PRINCETON, lambda: _loss(get_batch_logps), is_rounded=True),
        made(PRINCETON_FLOAT32, lambda: _loss(_get_batch_logps_float32)),
        made("TRL selective_log_softmax", _trl_loss, is_rounded=True),
        made("F.cross_entropy", lambda: cross_entropy, is_rounded=True),
        made("torch.compile", compiled(_loss(_get_batch_logps_float32)), is_compiled=True),
        made(
            "torch.compile cross_entropy",
            compiled(cross_entropy),
            is_compiled=True,
            is_rounded=True,
        ),
        # Its forward overwrites the logits with the gradient.
        made("Liger cross entropy", _liger, is_inplace=True, **rounded_cuda),
        made("quack cross_entropy", _quack, **rounded_cuda),
    ]
    return ours if softcap is not None else ours + peers
