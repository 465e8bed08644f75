"""How a trainer scores tokens: without logits where the model allows it, or from them."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from ..._calls import resolve_token_options
from ..._inputs.checks import check_bool, check_choice
from ..._ops.records import ENUMS
from ...options import LinearKeywords
from .causal_lm import CannotFuseError, FusedHead, FusedOutput, find_head

__all__ = ["FusedTier", "check_options"]

_logger = logging.getLogger(__name__)


def check_options(fused_linear: object, empty: object, logits_budget_bytes: int | None) -> None:
    """Options that both trainers have.

    Raises:
        TypeError: One is of the wrong type.
        ValueError: One is out of range.
    """
    if fused_linear is not None:
        check_bool("fused_linear", fused_linear)
    check_choice("empty", empty, ENUMS["empty"])
    resolve_token_options(LinearKeywords, logits_budget_bytes=logits_budget_bytes)


class FusedTier:
    """Doing without logits, and leaving it at that where a model does not allow it.

    Args:
        fused_linear: None: where the model allows it, and a warning says why not. True: an error
            does. False: no.
    """

    def __init__(self, fused_linear: bool | None) -> None:
        self.is_in_use = fused_linear is not False
        self._is_demanded = fused_linear is True
        self._head: FusedHead | None = None

    def check(self, trainer: Any, model: nn.Module, obstacle: str | None = None) -> None:
        """Finds out what can be told from a model without running it.

        Args:
            trainer: A transformers.Trainer.
            model: As it is called in training, or before it is wrapped for several devices.
            obstacle: A reason against it that the caller knows.

        Raises:
            ValueError: It is not allowed, and demanded.
        """
        if self.is_in_use:
            try:
                _find_head(trainer, model, obstacle)
            except CannotFuseError as reason:
                self._leave(reason)

    def forward(
        self,
        trainer: Any,
        model: nn.Module,
        input_ids: Tensor,  # [B, T]
        labels: Tensor,  # [B, T]
        obstacle: str | None = None,
        logits_budget_bytes: int | None = None,
        **kwargs: Any,
    ) -> FusedOutput | Any:
        """Runs the model.

        Args:
            trainer: See :meth:`check`.
            model: As it is called in training.
            input_ids: [B, T], the model's first argument.
            labels: [B, T] beside them, not shifted; -100 where nothing is scored.
            obstacle: See :meth:`check`.
            logits_budget_bytes: See :func:`simpo_ext.linear_token_logps`.
            **kwargs: What else the model is called with.

        Returns:
            A :class:`FusedOutput`, or, where the logits are formed, what the model returns.

        Raises:
            ValueError: See :meth:`check`.
        """
        outputs = None
        if self.is_in_use:
            try:
                unwrapped, linear = _find_head(trainer, model, obstacle)
                if self._head is None or self._head.head is not linear:
                    options = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
                    self._head = FusedHead.of(model, unwrapped, linear, input_ids, **options)
                return self._head(
                    model, labels, input_ids, logits_budget_bytes=logits_budget_bytes, **kwargs
                )
            except CannotFuseError as reason:
                self._leave(reason)
                outputs = reason.outputs
        return model(input_ids, **kwargs) if outputs is None else outputs

    def _leave(self, reason: CannotFuseError) -> None:
        if self._is_demanded:
            raise ValueError(
                f"fused_linear: expected None or False for this model, got True: {reason}"
            ) from reason
        _logger.warning("The logits are formed (fused_linear=False): %s", reason)
        self.is_in_use = False


def _find_head(trainer: Any, model: nn.Module, obstacle: str | None) -> tuple[nn.Module, nn.Linear]:
    """The model without what wraps it for several devices, and its lm_head."""
    if obstacle is not None:
        raise CannotFuseError(obstacle)
    if isinstance(model, nn.DataParallel):
        raise CannotFuseError("nn.DataParallel runs replicas of the model; use DDP")
    if trainer.args.torch_compile:
        raise CannotFuseError("torch_compile=True compiles the forward that forms them")
    unwrapped: nn.Module = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    return unwrapped, find_head(unwrapped)
