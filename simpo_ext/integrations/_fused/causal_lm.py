"""Token log-probabilities from a causal language model's own forward, without its logits.

The model is called as it is, wrapped by DDP, FSDP or DeepSpeed or not, so that their hooks see
every call that they wait for. Only lm_head is another one meanwhile: in place of the logits of the
hidden states it returns :class:`LazyLogits`, which carry the log-probabilities of the labels and
tell what the model does to the logits. The kernels have to know that before: a forward of two
tokens finds it out, and every other one confirms it.
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
    """The log-probabilities do not follow from hidden states and lm_head in a way known here.

    Of a forward that has been run, ``outputs`` are the model's, with logits.
    """

    outputs: Any = None


class FusedOutput(NamedTuple):
    """What a forward without logits comes to."""

    token_logps: Tensor
    """[B, T] as of :func:`simpo_ext.token_logps` with ``shift=True``."""
    mean_logits: Tensor
    """[B] mean of each row's logits, detached, over the vocabulary and all positions; under a
    softcap over those that are scored, and NaN without any."""
    outputs: Any
    """The model's own output, with log-probabilities [B, T, 1] for logits."""


def find_head(model: nn.Module) -> nn.Linear:
    """The lm_head of a model, which may be wrapped by PEFT.

    Raises:
        CannotFuseError: It is not one whose product with the hidden states is all it does.
    """
    peft_config: Any = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise CannotFuseError(
            f"PEFT's prompt learning ({peft_config.peft_type.value}) gives the model tokens that "
            "have no labels"
        )
    get_output_embeddings = getattr(_causal_lm_of(model), "get_output_embeddings", None)
    head = None if get_output_embeddings is None else get_output_embeddings()
    if head is None:
        raise CannotFuseError("the model has no output embeddings (get_output_embeddings())")
    kind = type(head)
    if kind.__module__.startswith("peft."):
        raise CannotFuseError(
            f"PEFT has wrapped the output embeddings in {kind.__name__}, so that their weight "
            "alone does not make the logits; leave them out of target_modules and modules_to_save"
        )
    if not isinstance(head, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise CannotFuseError(
            f"the output embeddings are not a plain nn.Linear, but {kind.__qualname__}"
        )
    if "forward" in vars(head):
        raise CannotFuseError("the forward of the output embeddings has been replaced")
    return head


class FusedHead:
    """The lm_head of one model, and what the model does to its output."""

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
        """Finds out what the model does to its logits.

        Args:
            model: As it is called in training; it is called once here, without a gradient.
            unwrapped: The same without what wraps it for several devices.
            head: Its lm_head, as :func:`find_head` finds it.
            input_ids: [B, T] of any batch, of which two tokens are taken.
            **kwargs: What else the forward is called with.

        Raises:
            CannotFuseError: Something else than to multiply them and to cap them; or it does not
                call lm_head once, with the hidden states of all tokens.
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
            torch.random.fork_rng(devices),  # dropout goes on with the numbers it would have had
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
        """The model's forward, with log-probabilities in place of logits.

        Args:
            model: As it is called in training.
            labels: [B, T] beside ``input_ids``, not shifted; -100 where nothing is scored.
            input_ids: [B, T], the model's first argument.
            logits_budget_bytes: See :func:`simpo_ext.linear_token_logps`.
            **kwargs: What else the model is called with.

        Raises:
            CannotFuseError: It does something else to its logits than :meth:`of` has found; they
                have been formed, and the error has the model's output.
        """
        is_scored = valid_tokens(labels, -100, shift=True)
        # Here, as it waits for a GPU: before the forward has been given to it.
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
                assert scored.mean_logit is not None  # 0 where nothing is scored
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
    """What became of lm_head's output in one forward."""

    def __init__(self) -> None:
        self.obstacle = ""
        self.transform: Transform | None = None  # None: none that the kernels know
        self._lazy: list[LazyLogits] = []

    @property
    def calls(self) -> int:
        """Of lm_head."""
        return len(self._lazy)

    def made(self, lazy: LazyLogits) -> LazyLogits:
        """One of what it returned."""
        self._lazy.append(lazy)
        return lazy

    def error(self, outputs: Any = None) -> CannotFuseError:
        """Why it cannot be fused, and the outputs if they have logits for all that."""
        names = [lazy.formed_for() for lazy in self._lazy if isinstance(lazy, LazyLogits)]
        done = next((name for name in names if name), "")
        if self.obstacle:
            reason = self.obstacle
        elif self.calls != 1:
            reason = f"the model calls its output embeddings {self.calls} times, not once"
        elif done:
            reason = f"the model does more to its logits than the kernels can ({done})"
        else:
            reason = "the model does other things to its logits at times"
        error = CannotFuseError(reason)
        # What lm_head carried and never was formed is no logits.
        if outputs is not None and not (self._lazy and outputs.logits.shape[-1] == 1 and not done):
            error.outputs = outputs
        return error


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    """That of lm_head's product."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _former(head: nn.Linear, hidden: Tensor) -> Callable[[], Tensor]:
    """What makes the logits, under the autocast that holds now."""
    device_type = hidden.device.type
    autocast = torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )

    def form() -> Tensor:
        if is_dtensor(head.weight) or head.weight.shape != (head.out_features, head.in_features):
            raise RuntimeError(
                "fused_linear: expected False for a model that does more to its logits than it did "
                "when it was probed, and whose lm_head is sharded again by then"
            )
        with autocast:
            return nn.Linear.forward(head, hidden)

    return form


def _causal_lm_of(model: nn.Module) -> nn.Module:
    """The module whose forward calls lm_head, within what PEFT has put around it."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    causal_lm: nn.Module = model if get_base_model is None else get_base_model()
    return causal_lm


# ---- forwards that are others for a while --------------------------------------------------------


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, a module has this forward; its hooks are called as ever."""
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
    """While inside, what a module's forward returns is changed.

    Not by a hook: PEFT calls the forward itself, and FSDP's own hooks are to see the change.
    """
    forward = module.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(forward(*args, **kwargs))

    with _forward_replaced(module, changed):
        yield
