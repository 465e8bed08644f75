"""The candidates from logits: this project's functions, the trainers' formulas, other packages.

Three kinds of work, each the same for all candidates that do it:

- ``sequence_loss``: SimPO's loss of the pairs from mean log-probabilities, on labels that are not
  shifted. With an odd B, the negative mean over the sequences.
- ``token_logps``: the log-probability of each label, on labels at the position of their logits.
- ``simpo_loss``: SimPO's loss from these.

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
from bench.common import reference
from bench.common.cases import IGNORE_INDEX
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

    def backward(self, output: Tensor, logits: Tensor, upstream: Tensor) -> Tensor:
        """The gradient of the logits; upstream [B, T] is of the log-probabilities."""
        grad_output = upstream.to(output.dtype) if self.work == "token_logps" else None
        (gradient,) = torch.autograd.grad(output, logits, grad_output)
        return gradient


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


def _cross_entropy_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability [B] by PyTorch's cross entropy, in the dtype of the logits."""
    labels = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
    )
    return -losses.view(labels.shape).sum(-1) / (labels != IGNORE_INDEX).sum(-1)


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


def _our_loss(inplace: bool, shift: bool = True) -> Forward:
    options = {"shift": shift, "inplace_backward": inplace}

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[0] % 2:
            return -simpo_ext.sequence_logps(logits, labels, **options).mean()
        return simpo_ext.simpo_loss(
            logits, labels, beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO, **options
        ).loss

    return forward


def loss_candidates() -> list[Candidate]:
    """All of them, this project's first."""

    def made(name: str, load: Callable[[], Forward], **fields: bool) -> Candidate:
        return Candidate(name, "sequence_loss", load, **fields)

    def compiled(batch_logps: Forward) -> Callable[[], Forward]:
        return lambda: torch.compile(_loss(batch_logps), dynamic=False, fullgraph=True)

    return [
        made(OURS, partial(_our_loss, False), is_ours=True),
        made(OURS_INPLACE, partial(_our_loss, True), is_ours=True, is_inplace=True),
        made(PRINCETON, lambda: _loss(get_batch_logps), is_rounded=True),
        made(PRINCETON_FLOAT32, lambda: _loss(_get_batch_logps_float32)),
        made("TRL selective_log_softmax", _trl_loss, is_rounded=True),
        made("F.cross_entropy", lambda: _loss(_cross_entropy_logps), is_rounded=True),
        made("torch.compile", compiled(_get_batch_logps_float32), is_compiled=True),
        made(
            "torch.compile cross_entropy",
            compiled(_cross_entropy_logps),
            is_compiled=True,
            is_rounded=True,
        ),
    ]


# ---- the log-probability of each label -------------------------------------------------------


def eager_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula as trainers write it, in float32."""
    logps = logits.float().log_softmax(-1)
    label_logps = logps.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return label_logps.masked_fill(labels == IGNORE_INDEX, 0.0)


def _eager_simpo_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return reference.simpo_loss(eager_token_logps(logits, labels), labels)


def _our_token_logps(inplace: bool, softcap: float | None) -> Forward:
    return partial(simpo_ext.token_logps, shift=False, softcap=softcap, inplace_backward=inplace)


def _per_token(cross_entropy: Callable[..., Tensor]) -> Forward:
    """Of a function with the arguments of PyTorch's cross entropy."""

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        return -losses.view(labels.shape)

    return forward


def _liger() -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _per_token(liger_cross_entropy)


def _quack() -> Forward:
    from quack.cross_entropy import cross_entropy

    return _per_token(cross_entropy)


def _trl_token_logps() -> Forward:
    from trl.trainer.utils import selective_log_softmax

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        label_logps = selective_log_softmax(logits, labels.clamp(min=0))
        return label_logps.masked_fill(labels == IGNORE_INDEX, 0.0)

    return forward


def our_token_logps(softcap: float | None = None) -> list[Candidate]:
    """This project's candidates: out of place and in place."""
    return [
        Candidate(name, "token_logps", partial(_our_token_logps, inplace, softcap), is_ours=True)
        for name, inplace in ((OURS, False), (OURS_INPLACE, True))
    ]


def candidates() -> list[Candidate]:
    """Those of the GPU benchmark, this project's first."""
    token_logps, loss = "token_logps", "simpo_loss"

    def compiled(function: Forward) -> Callable[[], Forward]:
        return lambda: torch.compile(function, dynamic=False)

    return [
        *our_token_logps(),
        Candidate("eager float32", token_logps, lambda: eager_token_logps),
        Candidate("torch.compile", token_logps, compiled(eager_token_logps)),
        Candidate("F.cross_entropy", token_logps, lambda: _per_token(F.cross_entropy)),
        Candidate("Liger cross entropy", token_logps, _liger, needs_cuda=True),
        Candidate("quack cross_entropy", token_logps, _quack, needs_cuda=True),
        Candidate("TRL selective_log_softmax", token_logps, _trl_token_logps),
        Candidate("simpo_ext loss", loss, partial(_our_loss, False, shift=False), is_ours=True),
        Candidate(
            "simpo_ext loss in place", loss, partial(_our_loss, True, shift=False), is_ours=True
        ),
        Candidate("eager float32 loss", loss, lambda: _eager_simpo_loss),
        Candidate("torch.compile loss", loss, compiled(_eager_simpo_loss)),
    ]
