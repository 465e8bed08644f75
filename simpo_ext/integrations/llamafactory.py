"""SimPO in LLaMA-Factory (``stage: dpo``, ``pref_loss: simpo``).

Run a file that calls :func:`patch` instead of ``llamafactory-cli train``::

    from simpo_ext.integrations import llamafactory

    llamafactory.patch()
    from llamafactory.train.tuner import run_exp

    run_exp()  # start with: python this_file.py config.yaml, or with torchrun

The parts can also be used on their own. :func:`get_batch_logps` and :func:`simpo_loss` have the
signatures of the functions that CustomDPOTrainer calls. List :class:`SimPOMixin` before
CustomDPOTrainer in the bases of a class. Supports LLaMA-Factory 0.9.3 to 0.9.5 and the later
trainer of its main branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .._inputs.checks import check_bool, check_number
from .._metrics.report import counted_pairs, row_means, valid_tokens
from ..options import EmptyPolicy
from ._fused.causal_lm import FusedOutput
from ._fused.tier import FusedTier, check_options

__all__ = ["PairForward", "SimPOMixin", "get_batch_logps", "patch", "simpo_loss", "simpo_trainer"]

_IGNORE_INDEX = -100  # CustomDPOTrainer's own
# The inputs of a text-only batch. A model with other inputs cannot run on the probe's two tokens.
_TEXT_INPUTS = {"attention_mask", "input_ids", "labels", "position_ids"}


def get_batch_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    label_pad_token_id: int = _IGNORE_INDEX,
    ld_alpha: float | None = None,
    *,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """Replaces ``get_batch_logps`` of llamafactory.train.trainer_utils.

    Args:
        logits: [B, T, V] float64, float32, bfloat16 or float16. They need no conversion to float32,
            because the kernels compute in float32 anyway.
        labels: [B, T] of an integer dtype. The logits at t score the label at t + 1.
        label_pad_token_id: The label of positions that are not scored. Default -100.
        ld_alpha: LD-DPO's factor in [0, 1] (arXiv 2409.06411) for the tokens of a completion past
            the length of the shorter completion of its pair. Rows 0..B/2-1 must be the chosen
            completions, and the others the rejected ones. None: 1.
        inplace_backward: See :func:`simpo_ext.functional.token_logps`.

    Returns:
        The sum of each completion's log-probabilities, [B] float32 (float64 for float64 logits),
        and its number of scored tokens, [B] int64. Both are 0 for a completion without scored
        tokens, so that LLaMA-Factory's average is NaN.

    Raises:
        TypeError: See :func:`simpo_ext.functional.token_logps`; or ``ld_alpha`` is not a number.
        ValueError: See :func:`simpo_ext.functional.token_logps`; or ``ld_alpha`` is not in [0, 1];
            or ``ld_alpha`` is given and B is odd.
        IndexError: See :func:`simpo_ext.functional.token_logps`.
    """
    token_logps = functional.token_logps(
        logits, labels, ignore_index=label_pad_token_id, inplace_backward=inplace_backward
    )
    return _sequence_sums(token_logps, labels, label_pad_token_id, ld_alpha)


def _sequence_sums(
    token_logps: Tensor,  # [B, T], 0 at positions that are not scored
    labels: Tensor,  # [B, T]
    label_pad_token_id: int,
    ld_alpha: float | None,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    is_scored = valid_tokens(labels, label_pad_token_id, shift=True)
    valid_length = is_scored.sum(-1)
    if ld_alpha is not None:
        ld_alpha = check_number("ld_alpha", ld_alpha, at_least=0.0, at_most=1.0)
        shorter = valid_length.view(2, _num_pairs("logits", labels)).amin(0).repeat(2)
        # LLaMA-Factory counts the common length from the first scored position.
        end = is_scored.to(torch.int8).argmax(-1) + shorter
        is_past = torch.arange(labels.shape[1], device=labels.device) >= end.unsqueeze(1)
        token_logps = torch.where(is_past, ld_alpha * token_logps, token_logps)
    return token_logps.sum(-1), valid_length


def simpo_loss(
    trainer: Any,
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
) -> Tensor:  # [P]
    """Replaces ``CustomDPOTrainer.simpo_loss``.

    The loss of a pair is -logsigmoid(beta (chosen - rejected) - simpo_gamma).

    Args:
        trainer: An object with ``beta`` (LLaMA-Factory's ``pref_beta``) and ``simpo_gamma``. It is
            the trainer if this function is one of its methods.
        chosen_logps: [P] floating-point, mean log-probabilities of the chosen completions.
        rejected_logps: [P], the same of the rejected completions.

    Returns:
        The loss [P] of each pair, without the SFT term; float32, or float64 if either input is.

    Raises:
        TypeError: See :func:`simpo_ext.functional.simpo_loss_from_logps`.
        ValueError: See :func:`simpo_ext.functional.simpo_loss_from_logps`.
    """
    losses, _, _ = functional.simpo_loss_from_logps(
        chosen_logps, rejected_logps, beta=trainer.beta, gamma=trainer.simpo_gamma
    )
    return losses


class PairForward(NamedTuple):
    """The results of ``concatenated_forward``.

    LLaMA-Factory 0.9.3 reads a tuple, and later versions read a dict by key. P is the number of
    pairs without the dropped ones.
    """

    chosen_logps: Tensor
    """[P] mean log-probability of each chosen completion."""
    rejected_logps: Tensor
    """[P] mean log-probability of each rejected completion."""
    chosen_logits: Tensor
    """Mean of the chosen logits, a detached scalar. The trainer logs only this mean."""
    rejected_logits: Tensor
    """Mean of the rejected logits, a detached scalar."""
    chosen_logps_avg: Tensor
    """[P], the same tensor as ``chosen_logps``, which are means already."""

    def __getitem__(self, key: Any) -> Any:
        """The tensor at an index or with a name."""
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class SimPOMixin:
    """Computes CustomDPOTrainer's reference-free losses with the kernels of this package.

    List the mixin before CustomDPOTrainer in the bases of a class. It replaces the forward of
    ``pref_loss: simpo`` and ``orpo``. Any other ``pref_loss`` has a reference model, and
    LLaMA-Factory's own code computes its loss.

    If the model allows it, log-probabilities come from the last hidden states and lm_head, and the
    logits are never in memory (:func:`simpo_ext.linear_token_logps`). Otherwise they come from the
    model's logits, without a float32 copy and without a copy of the log-softmax. (With
    ``bf16: true``, accelerate makes a float32 copy of the logits; with ``pure_bf16: true``, it does
    not.) The model gets no labels, because with labels it would compute a loss of its own.
    """

    fused_linear: bool | None = None
    """Whether to train without logits. None: if the model allows it; otherwise a warning gives the
    reason. True: an error gives the reason instead. False: never. A batch with more inputs than
    text always needs logits."""
    empty: EmptyPolicy = "drop"
    """What happens to a pair with a completion without scored tokens. ``"drop"``: the loss and the
    metrics leave the pair out. To find such pairs, the host waits for the GPU. If no pair is left,
    the loss and the metrics are NaN and the gradients are 0. ``"nan"``: the loss is NaN, as in
    LLaMA-Factory."""
    logits_budget_bytes: int | None = None
    """Used without logits only; see :func:`simpo_ext.linear_token_logps`."""
    inplace_backward: bool = False
    """Used with logits only: whether their gradient overwrites them in the backward. See
    :func:`simpo_ext.functional.token_logps`."""

    # Attributes of CustomDPOTrainer.
    accelerator: Any
    args: Any
    finetuning_args: Any
    beta: float
    simpo_gamma: float
    ld_alpha: float | None

    _tier: FusedTier | None = None

    def concatenated_forward(
        self, model: Any, batch: Mapping[str, Any], is_ref_model: bool = False
    ) -> Any:
        """Computes the log-probabilities of a batch of pairs.

        Args:
            model: A causal language model.
            batch: ``input_ids``, ``attention_mask`` and ``labels``, all [2P, T] with the chosen
                rows first, and other inputs of the model. The method does not modify it.
            is_ref_model: Whether ``model`` is the reference model.

        Returns:
            A :class:`PairForward`. With a reference model, CustomDPOTrainer's own result.

        Raises:
            TypeError: See :func:`get_batch_logps`.
            ValueError: See :func:`get_batch_logps`; or the number of rows is odd; or
                ``fused_linear`` is True and the model does not allow it.
            IndexError: See :func:`get_batch_logps`.
        """
        if self.finetuning_args.use_ref_model:
            return super().concatenated_forward(  # type: ignore[misc]
                model, batch, is_ref_model=is_ref_model
            )
        labels = batch["labels"]
        pairs = _num_pairs("batch", labels)
        token_logps, mean_logits = self._score(model, batch)
        of_rows = _sequence_sums(token_logps, labels, _IGNORE_INDEX, self.ld_alpha)
        logps, lengths, logits = (values.view(2, pairs) for values in (*of_rows, mean_logits))
        is_counted = counted_pairs(lengths.flatten(), self.empty)
        if is_counted is not None:
            logps, lengths, logits = (each[:, is_counted] for each in (logps, lengths, logits))
        chosen_logps, rejected_logps = logps / lengths
        chosen_logits, rejected_logits = logits.mean(1)
        return PairForward(
            chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_logps
        )

    def _score(
        self, model: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:  # [2P, T], [2P]
        """Token log-probabilities, 0 where they are not scored, and the mean logit of each row."""
        if self._tier is None:
            self._tier = FusedTier(self.fused_linear)
        inputs = {**batch, "return_dict": True, "use_cache": False}
        input_ids, labels = inputs.pop("input_ids"), inputs.pop("labels")
        others = sorted(batch.keys() - _TEXT_INPUTS)
        outputs = self._tier.forward(
            self,
            model,
            input_ids,
            labels,
            f"the batch has more than text: {', '.join(others)}" if others else None,
            self.logits_budget_bytes,
            **inputs,
        )
        if isinstance(outputs, FusedOutput):
            return outputs.token_logps, outputs.mean_logits
        logits = outputs.logits
        mean_logits = row_means(logits)  # now, because inplace_backward overwrites the logits
        token_logps = functional.token_logps(logits, labels, inplace_backward=self.inplace_backward)
        return token_logps, mean_logits

    simpo_loss = simpo_loss


def simpo_trainer(
    trainer_class: type,
    *,
    fused_linear: bool | None = None,
    empty: EmptyPolicy = "drop",
    logits_budget_bytes: int | None = None,
    inplace_backward: bool = False,
) -> type:
    """Makes a class that derives from :class:`SimPOMixin` and a CustomDPOTrainer.

    Args:
        trainer_class: CustomDPOTrainer or a subclass. If this function made the class, the result
            derives from the original class instead.
        fused_linear: See :attr:`SimPOMixin.fused_linear`.
        empty: See :attr:`SimPOMixin.empty`.
        logits_budget_bytes: See :attr:`SimPOMixin.logits_budget_bytes`.
        inplace_backward: See :attr:`SimPOMixin.inplace_backward`.

    Returns:
        A class with the name of ``trainer_class``.

    Raises:
        TypeError: An argument has the wrong type, or ``trainer_class`` has no
            ``concatenated_forward``.
        ValueError: An argument is out of range.
    """
    if not (isinstance(trainer_class, type) and hasattr(trainer_class, "concatenated_forward")):
        raise TypeError(
            "trainer_class: expected LLaMA-Factory's CustomDPOTrainer, a class with "
            f"concatenated_forward, got {trainer_class!r}"
        )
    check_options(fused_linear, empty, logits_budget_bytes)
    check_bool("inplace_backward", inplace_backward)
    base = next(each for each in trainer_class.__mro__ if not issubclass(each, SimPOMixin))
    attributes = {
        "fused_linear": fused_linear,
        "empty": empty,
        "logits_budget_bytes": logits_budget_bytes,
        "inplace_backward": inplace_backward,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (SimPOMixin, base), attributes)


def patch(
    *,
    fused_linear: bool | None = None,
    empty: EmptyPolicy = "drop",
    logits_budget_bytes: int | None = None,
    inplace_backward: bool = False,
) -> type:
    """Replaces LLaMA-Factory's CustomDPOTrainer by the result of :func:`simpo_trainer`.

    Call it before training starts. A second call overrides the options of the first.

    Args:
        fused_linear: See :attr:`SimPOMixin.fused_linear`.
        empty: See :attr:`SimPOMixin.empty`.
        logits_budget_bytes: See :attr:`SimPOMixin.logits_budget_bytes`.
        inplace_backward: See :attr:`SimPOMixin.inplace_backward`.

    Returns:
        The class that replaces ``llamafactory.train.dpo.trainer.CustomDPOTrainer``.

    Raises:
        ImportError: LLaMA-Factory is not installed.
        TypeError: See :func:`simpo_trainer`.
        ValueError: See :func:`simpo_trainer`.
    """
    from llamafactory.train.dpo import trainer, workflow

    patched = simpo_trainer(
        trainer.CustomDPOTrainer,
        fused_linear=fused_linear,
        empty=empty,
        logits_budget_bytes=logits_budget_bytes,
        inplace_backward=inplace_backward,
    )
    trainer.CustomDPOTrainer = patched
    if hasattr(workflow, "CustomDPOTrainer"):  # since 0.9.4, workflow imports it inside a function
        workflow.CustomDPOTrainer = patched
    return patched


def _num_pairs(name: str, rows: Tensor) -> int:
    """The number of pairs P. Rows 0..P-1 are the chosen completions, the others the rejected."""
    pairs, is_odd = divmod(rows.shape[0], 2)
    if is_odd:
        raise ValueError(
            f"{name}: expected chosen rows and as many rejected rows, got {rows.shape[0]} rows"
        )
    return pairs
