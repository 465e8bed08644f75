"""Token log-probabilities from a causal language model's own forward, without its logits.

This calls the trainer's model as it is, including any DDP, FSDP or DeepSpeed wrapper, so that the
wrapper's hooks run. During the call, lm_head's forward is replaced: it returns
:class:`LazyLogits` instead of logits. They carry the log-probabilities of the labels, and they
record what the model does to the logits. The kernels need this transform before they run, so a
probe forward of two tokens finds it first. Every later forward checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._calls import resolve_token_options
from ..._inputs.batch import linear_batch
from ..._inputs.checks import is_dtensor
from ..._metrics.report import ReportName, valid_tokens
from ...linear import score_tokens
from ...options import LinearKeywords
from .lazy_logits import LazyLogits, Transform

__all__ = ["CannotFuseError", "FusedHead", "FusedOutput", "find_head"]


class CannotFuseError(ValueError):
    """The kernels cannot compute this model's log-probabilities from hidden states and lm_head.

    If the model's forward has run already, ``outputs`` is what it returned, with logits.
    """

    outputs: Any = None


class FusedOutput(NamedTuple):
    """The results of a forward without logits."""

    token_logps: Tensor
    """[B, T], the values of :func:`simpo_ext.token_logps` with ``shift=True``."""
    mean_logits: Tensor
    """[B] mean of each row's logits over the vocabulary and all positions, detached. With a
    softcap, the mean is over the scored positions, and NaN for a row without any."""
    outputs: Any
    """The model's own output, with log-probabilities [B, T, 1] in place of the logits."""


def find_head(model: nn.Module) -> nn.Linear:
    """Returns the lm_head of a model, which may be wrapped by PEFT.

    Raises:
        CannotFuseError: The lm_head is missing, or it is not a plain ``nn.Linear``.
    """
    peft_config: Any = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise CannotFuseError(
            f"PEFT's prompt learning ({peft_config.peft_type.value}) adds tokens without labels"
        )
    get_output_embeddings = getattr(_causal_lm_of(model), "get_output_embeddings", None)
    head = None if get_output_embeddings is None else get_output_embeddings()
    if head is None:
        raise CannotFuseError("the model's get_output_embeddings() returns no output embeddings")
    kind = type(head)
    if kind.__module__.startswith("peft."):
        raise CannotFuseError(
            f"PEFT has wrapped the output embeddings in {kind.__name__}, and the kernels read only "
            "their weight; leave them out of target_modules and modules_to_save"
        )
    if not isinstance(head, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise CannotFuseError(
            f"the output embeddings are {kind.__qualname__}, not a plain nn.Linear"
        )
    if "forward" in vars(head):
        raise CannotFuseError("another library has replaced the forward of the output embeddings")
    return head


class FusedHead:
    """The lm_head of one model, and the transform that the model applies to its logits."""

    def __init__(self, causal_lm: nn.Module, head: nn.Linear, transform: Transform) -> None:
        self.causal_lm = causal_lm
        self.head = head
        self.transform = transform

    @classmethod
    def of(
        cls,
        model: nn.Module,
        unwrapped: nn.Module,
        head: nn.Linear,
        input_ids: Tensor,  # [B, T]
        **kwargs: Any,
    ) -> FusedHead:
        """Finds the model's transform of its logits with one forward of two tokens.

        Args:
            model: The model as the trainer calls it. The probe computes no gradient.
            unwrapped: The same model without DDP, FSDP or DeepSpeed.
            head: The lm_head that :func:`find_head` returns.
            input_ids: [B, T] of any batch. The probe takes two tokens of it.
            **kwargs: Other arguments of the model's forward.

        Raises:
            CannotFuseError: The model does more to its logits than scale and softcap them, or it
                does not call lm_head exactly once with the hidden states of all tokens.
        """
        causal_lm = _causal_lm_of(unwrapped)
        input_ids = input_ids[:1, :2]
        seen = _Seen()

        def forward(hidden: Tensor) -> Tensor:
            tokens, dtype = hidden.shape[:-1], _logits_dtype(hidden)
            logits = torch.zeros((*tokens, head.out_features), dtype=dtype, device=hidden.device)
            if is_dtensor(head.weight):
                seen.obstacle = "the output embeddings are sharded for tensor parallelism"
            elif tokens != input_ids.shape:
                seen.obstacle = (
                    f"the output embeddings get the hidden states of {list(tokens)} tokens for "
                    f"input_ids of shape {list(input_ids.shape)}"
                )
            payload = torch.zeros((*tokens, 1), device=hidden.device)
            return seen.made(
                LazyLogits.instead_of(lambda: logits, head.out_features, dtype, payload)
            )

        def look(outputs: Any) -> Any:
            logits = outputs.logits
            if isinstance(logits, LazyLogits):
                seen.transform = logits.transform()
                outputs.logits = logits.take_payload()
            return outputs

        devices = [input_ids.device] if input_ids.device.type == "cuda" else []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),  # the probe must not change the dropout of training
            _forward_replaced(head, forward),
            _output_changed(causal_lm, look),
        ):
            model(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)
        if seen.obstacle or seen.calls != 1 or seen.transform is None:
            raise seen.error()
        return cls(causal_lm, head, seen.transform)

    def __call__(
        self,
        model: nn.Module,
        labels: Tensor,  # [B, T]
        input_ids: Tensor,  # [B, T]
        *,
        logits_budget_bytes: int | None = None,
        **kwargs: Any,
    ) -> FusedOutput:
        """Runs the model's forward, with log-probabilities in place of logits.

        Args:
            model: The model as the trainer calls it.
            labels: [B, T] like ``input_ids``, not shifted; -100 for positions that are not scored.
            input_ids: [B, T], the model's first argument.
            logits_budget_bytes: See :func:`simpo_ext.linear_token_logps`.
            **kwargs: Other arguments of the model's forward.

        Raises:
            CannotFuseError: The model's transform differs from the one that :meth:`of` found. If
                the forward has computed the logits, the error carries the model's output.
        """
        is_scored = valid_tokens(labels, -100, shift=True)
        # This read makes the host wait for the GPU, so it comes before the forward is launched.
        count = int(is_scored.sum())
        logit_scale, softcap = self.transform
        seen = _Seen()
        means: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            if hidden.shape[:-1] != labels.shape:
                return nn.Linear.forward(self.head, hidden)
            call = resolve_token_options(
                LinearKeywords,
                logit_scale=logit_scale,
                softcap=softcap,
                logits_budget_bytes=logits_budget_bytes,
            ).with_count(count)
            linear = linear_batch(
                hidden, self.head.weight, labels.to(hidden.device), self.head.bias, None
            )
            report: tuple[ReportName, ...] = ("logits_all" if softcap is None else "logits",)
            scored = score_tokens(linear, linear.batch.labels, call, report)
            if scored.all_mean_logits is not None:
                means.append(scored.all_mean_logits.mean(1))
            else:
                assert scored.mean_logit is not None  # 0 at positions that are not scored
                means.append(scored.mean_logit.sum(1) / is_scored.sum(1))
            return seen.made(
                LazyLogits.instead_of(
                    _former(self.head, hidden),
                    self.head.out_features,
                    _logits_dtype(hidden),
                    scored.logps.unsqueeze(-1).clone(),
                )
            )

        def take_logps(outputs: Any) -> Any:
            logits = outputs.logits
            if isinstance(logits, LazyLogits):
                seen.transform = logits.transform() if seen.calls == 1 else None
                is_fused = seen.transform == self.transform
                outputs.logits = logits.take_payload() if is_fused else logits.formed()
            return outputs

        with _forward_replaced(self.head, forward), _output_changed(self.causal_lm, take_logps):
            outputs = model(input_ids, **kwargs)
        if seen.transform != self.transform:
            raise seen.error(outputs)
        return FusedOutput(outputs.logits.squeeze(-1), means[0], outputs)


class _Seen:
    """What one forward of the model did with lm_head's output."""

    def __init__(self) -> None:
        self.obstacle = ""
        self.transform: Transform | None = None  # None: the kernels do not support it
        self._lazy: list[LazyLogits] = []

    @property
    def calls(self) -> int:
        """How often the model called lm_head."""
        return len(self._lazy)

    def made(self, lazy: LazyLogits) -> LazyLogits:
        """Records an output of lm_head and returns it."""
        self._lazy.append(lazy)
        return lazy

    def error(self, outputs: Any = None) -> CannotFuseError:
        """Makes the error with its reason, and with ``outputs`` if these contain logits."""
        names = [lazy.formed_for() for lazy in self._lazy if isinstance(lazy, LazyLogits)]
        done = next((name for name in names if name), "")
        if self.obstacle:
            reason = self.obstacle
        elif self.calls != 1:
            reason = f"the model calls its output embeddings {self.calls} times, not once"
        elif done:
            reason = f"the kernels do not support what the model does to its logits ({done})"
        else:
            reason = "the logits have a scale or softcap that is unsupported or changes"
        error = CannotFuseError(reason)
        # A last dimension of 1 without computed logits is the payload of LazyLogits.
        if outputs is not None and not (self._lazy and outputs.logits.shape[-1] == 1 and not done):
            error.outputs = outputs
        return error


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of lm_head's output under the current autocast."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _former(head: nn.Linear, hidden: Tensor) -> Callable[[], Tensor]:
    """Returns a function that computes the logits under the current autocast."""
    device_type = hidden.device.type
    autocast = torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )

    def form() -> Tensor:
        if is_dtensor(head.weight) or head.weight.shape != (head.out_features, head.in_features):
            raise RuntimeError(
                "fused_linear: expected False for a model with a sharded lm_head that changes its "
                "transform of the logits after the first batch, got None or True"
            )
        with autocast:
            return nn.Linear.forward(head, hidden)

    return form


def _causal_lm_of(model: nn.Module) -> nn.Module:
    """The module whose forward calls lm_head, without the PEFT wrapper."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    causal_lm: nn.Module = model if get_base_model is None else get_base_model()
    return causal_lm


# ---- temporary replacement of a forward ----------------------------------------------------------


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's forward inside the context. The module's hooks still run."""
    attributes = vars(module)
    had_its_own, before = "forward" in attributes, attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if had_its_own:
            attributes["forward"] = before
        else:
            del attributes["forward"]


@contextmanager
def _output_changed(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Applies ``change`` to the output of a module's forward inside the context.

    A hook cannot do this: PEFT calls the forward directly, and FSDP's hooks must see the changed
    output.
    """
    forward = module.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(forward(*args, **kwargs))

    with _forward_replaced(module, changed):
        yield
