"""Token log-probabilities from a causal language model's own forward, without its logits.

The model is called as it is, wrapped by DDP, FSDP or DeepSpeed or not, so that their hooks see
every call that they wait for. Only lm_head is another one meanwhile: in place of the logits
[B, T, V] of the hidden states it returns the log-probabilities [B, T, 1] of the labels.

What a model does to the logits after lm_head is found out by a probe, a forward of two tokens in
which lm_head returns numbers that are known. Nothing, a factor, or a softcap are taken over into
the kernels; anything else is a reason not to do without the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import is_dtensor
from .._linear import score_labels
from .._report import valid_tokens

__all__ = ["CannotFuseError", "FusedHead", "FusedOutput", "find_head"]

# The logits that the probe looks at: on both sides of 0, and far enough out for any softcap to
# show. A factor and a softcap are read from the first two.
_PROBED = (1.0, 3.0, -0.25, -7.0, 20.0, -45.0, 90.0, 0.0)


class CannotFuseError(ValueError):
    """The log-probabilities do not follow from hidden states and lm_head in a way known here."""


class FusedOutput(NamedTuple):
    """What a forward without logits comes to."""

    token_logps: Tensor
    """[B, T] as of :func:`simpo_ext.token_logps` with ``shift=True``."""
    mean_logits: Tensor
    """[B, T] mean over the vocabulary of each position's logits, detached."""
    is_mean_known: Tensor | None
    """[B, T] bool: where; None: everywhere. Under a softcap, at scored positions."""
    outputs: Any
    """The model's own output, with log-probabilities [B, T, 1] for logits."""

    def mean_logits_of(self, rows: slice) -> Tensor:
        """A tensor whose mean is that of the known logits of these rows."""
        means = self.mean_logits[rows]
        if self.is_mean_known is None:
            return means
        is_known = self.is_mean_known[rows]
        return torch.where(is_known, means, 0.0).sum() / is_known.sum()


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
    """The lm_head of one model, and what the model makes of its output."""

    def __init__(
        self, causal_lm: nn.Module, head: nn.Linear, logit_scale: float, softcap: float | None
    ) -> None:
        self.causal_lm = causal_lm
        self.head = head
        self.logit_scale = logit_scale
        self.softcap = softcap

    @classmethod
    def of(
        cls,
        model: nn.Module,
        unwrapped: nn.Module,
        head: nn.Linear,
        input_ids: Tensor,  # [B, T]
        **kwargs: Any,
    ) -> FusedHead:
        """Finds out what becomes of the head's output.

        Args:
            model: As it is called in training; it is called once here, without a gradient.
            unwrapped: The same without what wraps it for several devices.
            head: Its lm_head, as :func:`find_head` finds it.
            input_ids: [B, T] of any batch, of which two tokens are taken.
            kwargs: What else the forward is called with.

        Raises:
            CannotFuseError: The model does something else after lm_head than a factor or a softcap,
                or calls it otherwise than once, on the hidden states of all tokens.
        """
        causal_lm = _causal_lm_of(unwrapped)
        input_ids = input_ids[:1, :2]
        probe = _probe((*input_ids.shape, head.out_features), input_ids.device)
        calls: list[tuple[torch.Size, bool]] = []
        found: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            calls.append((hidden.shape[:-1], is_dtensor(head.weight)))
            return probe.clone()  # which the model may change in place

        def keep_logits(outputs: Any) -> Any:
            found.append(outputs.logits)
            return outputs

        with (
            torch.no_grad(),
            _forward_replaced(head, forward),
            _output_changed(causal_lm, keep_logits),
        ):
            model(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)
        if len(calls) != 1 or len(found) != 1:
            raise CannotFuseError(
                f"the model calls its output embeddings {len(calls)} times in a forward, not once"
            )
        ((tokens, is_sharded),), (logits,) = calls, found
        if is_sharded:
            raise CannotFuseError("the output embeddings are sharded for tensor parallelism")
        if tokens != input_ids.shape or logits.shape != probe.shape:
            raise CannotFuseError(
                f"input_ids of shape {list(input_ids.shape)} become hidden states of "
                f"{list(tokens)} tokens and logits of shape {list(logits.shape)}, not one of each "
                f"for each token"
            )
        return cls(causal_lm, head, *_scale_and_softcap(probe, logits))

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
            kwargs: What else the model is called with.
        """
        is_scored = valid_tokens(labels, -100, shift=True)
        # Here, as it waits for a GPU: before the forward has been given to it.
        count = int(is_scored.sum())
        means: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            scored = score_labels(
                hidden,
                self.head.weight,
                labels.to(hidden.device),
                bias=self.head.bias,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                logits_budget_bytes=logits_budget_bytes,
                num_valid_tokens=count,
                report=["logits_all" if self.softcap is None else "logits"],
            )
            mean = scored.mean_logit if scored.all_mean_logits is None else scored.all_mean_logits
            assert mean is not None
            means.append(mean)
            return scored.logps.unsqueeze(-1)

        with _forward_replaced(self.head, forward), _logits_of_head(self.causal_lm, self.head):
            outputs = model(input_ids, **kwargs)
        (mean,) = means
        is_mean_known = None if self.softcap is None else is_scored
        return FusedOutput(outputs.logits.squeeze(-1), mean, is_mean_known, outputs)


def _causal_lm_of(model: nn.Module) -> nn.Module:
    """The module whose forward calls lm_head, within what PEFT has put around it."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    causal_lm: nn.Module = model if get_base_model is None else get_base_model()
    return causal_lm


# ---- the probe -----------------------------------------------------------------------------------


def _probe(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Logits of this shape that are known: float64, so that a factor can be read off exactly."""
    repeats = -(-math.prod(shape) // len(_PROBED))
    values = torch.tensor(_PROBED, dtype=torch.float64, device=device).repeat(repeats)
    return values[: math.prod(shape)].view(shape)


def _scale_and_softcap(probe: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """What a model has made of the probe, as the kernels' options.

    Raises:
        CannotFuseError: Something else.
    """
    precision = 8 * torch.finfo(logits.dtype).eps
    found = logits.to(torch.float64)
    at_1, at_3 = (float(value) for value in found.flatten()[:2])
    candidates: list[tuple[float, float | None]] = [(at_1, None)]
    # c tanh(s x / c) at 1 and at 3: with t = tanh(s / c), their ratio is (3 + t^2) / (1 + 3 t^2).
    ratio = at_3 / at_1 if at_1 else math.nan
    if 1.0 < ratio < 3.0:
        t = math.sqrt((3.0 - ratio) / (3.0 * ratio - 1.0))
        # Rounded: a dtype's last digits are those of the error.
        softcap = float(f"{at_1 / t:.{max(1, int(-math.log10(precision)) - 3)}g}")
        if abs(at_1) < abs(softcap):
            candidates.append((softcap * math.atanh(at_1 / softcap), softcap))
    for scale, cap in candidates:
        if abs(scale - 1.0) <= 100 * precision:
            scale = 1.0
        expected = probe * scale if cap is None else cap * torch.tanh(probe * scale / cap)
        is_known = torch.allclose(found, expected, rtol=precision, atol=0.0)
        # A factor is as exact as the dtype that it was read in.
        if is_known and scale >= 1e-30 and (scale == 1.0 or precision < 1e-5):
            return scale, cap
    raise CannotFuseError(
        f"after its output embeddings, the model makes of logits {list(_PROBED)} "
        f"{logits.flatten()[: len(_PROBED)].tolist()}, which is neither a factor nor a softcap"
    )


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


@contextmanager
def _logits_of_head(causal_lm: nn.Module, head: nn.Module) -> Iterator[None]:
    """While inside, the model's logits are what its lm_head, hooks and all, returns."""
    of_head: list[Tensor] = []

    def keep_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        of_head.append(output)
        return output.clone()  # which the model may change in place

    def replace_logits(outputs: Any) -> Any:
        outputs.logits = of_head.pop()
        return outputs

    handle = head.register_forward_hook(keep_output)
    try:
        with _output_changed(causal_lm, replace_logits):
            yield
    finally:
        handle.remove()
