"""Scores a trainer's tokens without logits if the model allows it, and from logits otherwise."""

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
    """Checks the options that the integrations for TRL and LLaMA-Factory share.

    Raises:
        TypeError: One is of the wrong type.
        ValueError: One is out of range.
    """
    if fused_linear is not None:
        check_bool("fused_linear", fused_linear)
    check_choice("empty", empty, ENUMS["empty"])
    resolve_token_options(LinearKeywords, logits_budget_bytes=logits_budget_bytes)


class FusedTier:
    """Scores tokens without logits, and permanently falls back to logits if the model needs them.

    Args:
        fused_linear: None: falls back with a warning that gives the reason. True: raises an error
            instead of falling back. False: always uses logits.
    """

    def __init__(self, fused_linear: bool | None) -> None:
        self.is_in_use = fused_linear is not False
        self._is_demanded = fused_linear is True
        self._head: FusedHead | None = None

    def check(self, trainer: Any, model: nn.Module, obstacle: str | None = None) -> None:
        """Checks a model without running it, and falls back to logits if the model needs them.

        Args:
            trainer: A transformers.Trainer.
            model: The model as the trainer calls it, or before DDP, FSDP or DeepSpeed wrap it.
            obstacle: The caller's reason why the model needs logits, or None.

        Raises:
            ValueError: The model needs logits, and ``fused_linear`` is True.
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
        """Runs the model on a batch.

        Args:
            trainer: See :meth:`check`.
            model: The model as the trainer calls it.
            input_ids: [B, T], the model's first argument.
            labels: [B, T] like ``input_ids``, not shifted; -100 for positions that are not scored.
            obstacle: See :meth:`check`.
            logits_budget_bytes: See :func:`simpo_ext.linear_token_logps`.
            **kwargs: Other arguments of the model's forward.

        Returns:
            A :class:`FusedOutput`, or the model's own output if the logits are computed.

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
        _logger.warning("The model computes its logits (fused_linear=False): %s", reason)
        self.is_in_use = False


def _find_head(trainer: Any, model: nn.Module, obstacle: str | None) -> tuple[nn.Module, nn.Linear]:
    """The model without DDP, FSDP or DeepSpeed, and its lm_head."""
    if obstacle is not None:
        raise CannotFuseError(obstacle)
    if isinstance(model, nn.DataParallel):
        raise CannotFuseError("nn.DataParallel runs replicas of the model; use DDP")
    if trainer.args.torch_compile:
        raise CannotFuseError("torch_compile=True compiles the forward that computes the logits")
    unwrapped: nn.Module = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    return unwrapped, find_head(unwrapped)
