"""SimPO in LLaMA-Factory (``stage: dpo``, ``pref_loss: simpo``).

A file that calls :func:`patch` takes the place of ``llamafactory-cli train``::

    from simpo_ext.integrations import llamafactory

    llamafactory.patch()
    from llamafactory.train.tuner import run_exp

    run_exp()  # python this_file.py config.yaml, or torchrun with it

Or put the functions in by hand: :func:`get_batch_logps` and :func:`simpo_loss` have the signatures
of those that CustomDPOTrainer calls, and :class:`SimPOMixin` is what stands before it in the bases
of a class. For LLaMA-Factory 0.9.3 to 0.9.5, and the trainer of its main branch since.
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
# What a batch of text has. A model that takes more may not be run with less, to be probed.
_TEXT_INPUTS = {"attention_mask", "input_ids", "labels", "position_ids"}


def get_batch_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    label_pad_token_id: int = _IGNORE_INDEX,
    ld_alpha: float | None = None,
    *,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """``get_batch_logps`` of llamafactory.train.trainer_utils: sums over tokens, and their number.

    Args:
        logits: [B, T, V] float64, float32, bfloat16 or float16, as the model returns them: there is
            nothing to gain from a float32 copy.
        labels: [B, T] of an integer dtype; those at t + 1 are scored with the logits at t.
        label_pad_token_id: The label of positions that are not scored. Default -100.
        ld_alpha: Factor in [0, 1] of LD-DPO (arXiv 2409.06411) on the tokens of a completion past
            the length of its pair's shorter one; rows 0..B/2-1 are then chosen and the others
            rejected. None: 1.
        inplace_backward: See :func:`simpo_ext.functional.token_logps`.

    Returns:
        The sums [B], float32 (float64 for float64 logits), and the number of scored tokens [B],
        int64. Both are 0 for a completion without any, as in LLaMA-Factory, whose average is NaN.

    Raises:
        TypeError: As :func:`simpo_ext.functional.token_logps`; or ``ld_alpha`` is not a number.
        ValueError: The same; ``ld_alpha`` is not in [0, 1], or given for an odd B.
        IndexError: As :func:`simpo_ext.functional.token_logps`.
    """
    token_logps = functional.token_logps(
        logits, labels, ignore_index=label_pad_token_id, inplace_backward=inplace_backward
    )
    return _sequence_sums(token_logps, labels, label_pad_token_id, ld_alpha)


def _sequence_sums(
    token_logps: Tensor,  # [B, T], 0 where nothing is scored
    labels: Tensor,  # [B, T]
    label_pad_token_id: int,
    ld_alpha: float | None,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    is_scored = valid_tokens(labels, label_pad_token_id, shift=True)
    valid_length = is_scored.sum(-1)
    if ld_alpha is not None:
        ld_alpha = check_number("ld_alpha", ld_alpha, at_least=0.0, at_most=1.0)
        shorter = valid_length.view(2, _num_pairs("logits", labels)).amin(0).repeat(2)
        # The common length is measured in positions from the first that is scored.
        end = is_scored.to(torch.int8).argmax(-1) + shorter
        is_past = torch.arange(labels.shape[1], device=labels.device) >= end.unsqueeze(1)
        token_logps = torch.where(is_past, ld_alpha * token_logps, token_logps)
    return token_logps.sum(-1), valid_length


def simpo_loss(
    trainer: Any,
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
) -> Tensor:  # [P]
    """``CustomDPOTrainer.simpo_loss``: -logsigmoid(beta (chosen - rejected) - simpo_gamma).

    Args:
        trainer: What has ``beta`` (``pref_beta``) and ``simpo_gamma`` (itself): the trainer, as
            whose method this can be put in.
        chosen_logps: [P] floating-point, means over tokens.
        rejected_logps: [P].

    Returns:
        The loss [P] of each pair, without the SFT term; float32, or float64 if either input is.

    Raises:
        TypeError: As :func:`simpo_ext.functional.simpo_loss_from_logps`.
        ValueError: The same.
    """
    losses, _, _ = functional.simpo_loss_from_logps(
        chosen_logps, rejected_logps, beta=trainer.beta, gamma=trainer.simpo_gamma
    )
    return losses


class PairForward(NamedTuple):
    """What ``concatenated_forward`` returns: a tuple as to 0.9.3, read by key as a dict since.

    Of P pairs, or of those that are counted.
    """

    chosen_logps: Tensor
    """[P] mean log-probability of each chosen completion."""
    rejected_logps: Tensor
    """[P] the same of each rejected completion."""
    chosen_logits: Tensor
    """Mean of the chosen logits, detached: a scalar, which is all that the trainer logs of them."""
    rejected_logits: Tensor
    """The same of the rejected logits."""
    chosen_logps_avg: Tensor
    """[P] ``chosen_logps``, which are averages already."""

    def __getitem__(self, key: Any) -> Any:
        """The tensor at an index, or of a name."""
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class SimPOMixin:
    """Before CustomDPOTrainer in the bases of a class: its reference-free losses on the kernels.

    ``concatenated_forward`` is that of ``pref_loss: simpo`` and ``orpo``. Where the model allows
    it, log-probabilities come from the last hidden states and lm_head, and there are no logits in
    memory (:func:`simpo_ext.linear_token_logps`). Otherwise they come from the logits as the model
    returns them: without a float32 copy, or one of their log-softmax. (Under ``bf16: true``,
    accelerate has made a float32 copy already, but not under ``pure_bf16: true``.) Labels do not go
    into the model, which would compute a loss of its own. Any other ``pref_loss`` has a reference
    model and stays LLaMA-Factory's.
    """

    fused_linear: bool | None = None
    """Whether to do without logits. None: where the model allows it; otherwise a warning says why
    not. True: an error does. False: no. A batch of more than text has logits."""
    empty: EmptyPolicy = "drop"
    """What becomes of a pair with a completion that has no token to score. ``"drop"``: it is left
    out of the loss, its mean and the metrics, for a synchronization with the device; where no pair
    is left, these are NaN and gradients 0. ``"nan"``: as in LLaMA-Factory, it makes the loss NaN.
    """
    logits_budget_bytes: int | None = None
    """Where there are no logits: see :func:`simpo_ext.linear_token_logps`."""
    inplace_backward: bool = False
    """Where there are logits: whether the backward overwrites them with their gradient. See
    :func:`simpo_ext.functional.token_logps`."""

    # CustomDPOTrainer's.
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
        """Log-probabilities of the pairs of a batch.

        Args:
            model: A causal language model, called with the batch.
            batch: ``input_ids``, ``attention_mask`` and ``labels``, all [2P, T] and chosen first,
                and what else the model takes; left as it is.
            is_ref_model: Whether ``model`` is the reference model.

        Returns:
            A :class:`PairForward`, or what CustomDPOTrainer returns if there is a reference model.

        Raises:
            TypeError: As :func:`get_batch_logps`.
            ValueError: The same; the rows of the batch are odd in number; or ``fused_linear`` is
                True and the model does not allow it.
            IndexError: As :func:`get_batch_logps`.
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
        """Log-probabilities of tokens, 0 where nothing is scored, and each row's mean logit."""
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
            f"the model takes more than text: {', '.join(others)}" if others else None,
            self.logits_budget_bytes,
            **inputs,
        )
        if isinstance(outputs, FusedOutput):
            return outputs.token_logps, outputs.mean_logits
        logits = outputs.logits
        mean_logits = row_means(logits)  # before a backward overwrites them
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
    """The subclass of a CustomDPOTrainer that has :class:`SimPOMixin` before it.

    Args:
        trainer_class: CustomDPOTrainer, or a subclass; of what this function has returned before,
            the class it was made of is taken.
        fused_linear: See :attr:`SimPOMixin.fused_linear`.
        empty: See :attr:`SimPOMixin.empty`.
        logits_budget_bytes: See :attr:`SimPOMixin.logits_budget_bytes`.
        inplace_backward: See :attr:`SimPOMixin.inplace_backward`.

    Returns:
        A class of the same name.

    Raises:
        TypeError: An argument is of the wrong type, or the class has no ``concatenated_forward``.
        ValueError: One is out of range.
    """
    if not (isinstance(trainer_class, type) and hasattr(trainer_class, "concatenated_forward")):
        raise TypeError(
            "trainer_class: expected LLaMA-Factory's CustomDPOTrainer, with a "
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
    """Has LLaMA-Factory train with :func:`simpo_trainer` of its CustomDPOTrainer.

    To be called before training starts. What is called last holds.

    Args:
        fused_linear: See :attr:`SimPOMixin.fused_linear`.
        empty: See :attr:`SimPOMixin.empty`.
        logits_budget_bytes: See :attr:`SimPOMixin.logits_budget_bytes`.
        inplace_backward: See :attr:`SimPOMixin.inplace_backward`.

    Returns:
        The class, in the place of ``llamafactory.train.dpo.trainer.CustomDPOTrainer``.

    Raises:
        ImportError: LLaMA-Factory is not installed.
        TypeError: As :func:`simpo_trainer`.
        ValueError: The same.
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
    if hasattr(workflow, "CustomDPOTrainer"):  # from 0.9.4 on, it is imported where it is used
        workflow.CustomDPOTrainer = patched
    return patched


def _num_pairs(name: str, rows: Tensor) -> int:
    """P, of rows 0..P-1 that are chosen and rows P..2P-1 that are rejected."""
    pairs, is_odd = divmod(rows.shape[0], 2)
    if is_odd:
        raise ValueError(
            f"{name}: expected chosen rows and as many rejected ones, got {rows.shape[0]} rows"
        )
    return pairs
