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
from torch import Tensor

from .. import _checks, functional
from .._options import EMPTY_POLICIES, EmptyPolicy
from .._report import valid_tokens

__all__ = ["PairForward", "SimPOMixin", "get_batch_logps", "patch", "simpo_loss", "simpo_trainer"]


def get_batch_logps(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    label_pad_token_id: int = -100,
    ld_alpha: float | None = None,
    *,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """``get_batch_logps`` of llamafactory.train.trainer_utils: sums over tokens, and their number.

    Args:
        logits: [B, T, V] float64, float32, bfloat16 or float16, as the model returns them: there is
            nothing to gain from a float32 copy.
        labels: [B, T] of an integer dtype; those at t + 1 are scored with the logits at t.
        label_pad_token_id: The label of positions that are not scored.
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
    is_scored = valid_tokens(labels, label_pad_token_id, shift=True)
    valid_length = is_scored.sum(-1)
    if ld_alpha is not None:
        ld_alpha = _checks.check_number("ld_alpha", ld_alpha, at_least=0.0, at_most=1.0)
        shorter = _pairs("logits", valid_length).amin(0).repeat(2)
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
    """Mean of all chosen logits, detached: a scalar, which is all that the trainer logs of them."""
    rejected_logits: Tensor
    """The same of the rejected logits."""
    chosen_logps_avg: Tensor
    """[P] ``chosen_logps``, which are averages already."""

    def __getitem__(self, key: Any) -> Any:
        """The tensor at an index, or of a name."""
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class SimPOMixin:
    """Before CustomDPOTrainer in the bases of a class: its reference-free losses on the kernels.

    ``concatenated_forward`` is that of ``pref_loss: simpo`` and ``orpo``, with log-probabilities
    from the logits as the model returns them: without a float32 copy of them, or of their
    log-softmax. Labels do not go into the model, which would compute a loss of its own. Any other
    ``pref_loss`` has a reference model and stays LLaMA-Factory's.
    """

    empty: EmptyPolicy = "drop"
    """What becomes of a pair with a completion that has no token to score. ``"drop"``: it is left
    out of the loss, its mean and the metrics, for a synchronization with the device; where no pair
    is left, these are NaN and gradients 0. ``"nan"``: as in LLaMA-Factory, it makes the loss NaN.
    """
    inplace_backward: bool = False
    """Whether the backward overwrites the logits with their gradient. See
    :func:`simpo_ext.functional.token_logps`."""

    # CustomDPOTrainer's.
    finetuning_args: Any
    beta: float
    simpo_gamma: float
    ld_alpha: float | None

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
            ValueError: The same, or the rows of the batch are odd in number.
            IndexError: The same.
        """
        if self.finetuning_args.use_ref_model:
            return super().concatenated_forward(  # type: ignore[misc]
                model, batch, is_ref_model=is_ref_model
            )
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, return_dict=True, use_cache=False).logits
        logps, lengths = get_batch_logps(
            logits, batch["labels"], ld_alpha=self.ld_alpha, inplace_backward=self.inplace_backward
        )
        logps, lengths = _pairs("batch", logps), _pairs("batch", lengths)
        if self.empty == "drop":
            is_counted = (lengths > 0).all(0)
            logps, lengths = logps[:, is_counted], lengths[:, is_counted]
        chosen_logps, rejected_logps = logps / lengths
        chosen_logits, rejected_logits = map(_mean, logits.detach().chunk(2))
        return PairForward(
            chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_logps
        )

    simpo_loss = simpo_loss


def simpo_trainer(
    trainer_class: type, *, empty: EmptyPolicy = "drop", inplace_backward: bool = False
) -> type:
    """The subclass of a CustomDPOTrainer that has :class:`SimPOMixin` before it.

    Args:
        trainer_class: CustomDPOTrainer, or a subclass; of what this function has returned before,
            the class it was made of is taken.
        empty: See :attr:`SimPOMixin.empty`.
        inplace_backward: See :attr:`SimPOMixin.inplace_backward`.

    Returns:
        A class of the same name.

    Raises:
        TypeError: An argument is of the wrong type, or the class has no ``concatenated_forward``.
        ValueError: There is no such ``empty``.
    """
    if not (isinstance(trainer_class, type) and hasattr(trainer_class, "concatenated_forward")):
        raise TypeError(
            "trainer_class: expected LLaMA-Factory's CustomDPOTrainer, with a "
            f"concatenated_forward, got {trainer_class!r}"
        )
    _checks.check_choice("empty", empty, EMPTY_POLICIES)
    _checks.check_bool("inplace_backward", inplace_backward)
    base = next(each for each in trainer_class.__mro__ if not issubclass(each, SimPOMixin))
    options = {
        "empty": empty,
        "inplace_backward": inplace_backward,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (SimPOMixin, base), options)


def patch(*, empty: EmptyPolicy = "drop", inplace_backward: bool = False) -> type:
    """Has LLaMA-Factory train with :func:`simpo_trainer` of its CustomDPOTrainer.

    To be called before training starts. What is called last holds.

    Args:
        empty: See :attr:`SimPOMixin.empty`.
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
        trainer.CustomDPOTrainer, empty=empty, inplace_backward=inplace_backward
    )
    trainer.CustomDPOTrainer = patched
    if hasattr(workflow, "CustomDPOTrainer"):  # from 0.9.4 on, it is imported where it is used
        workflow.CustomDPOTrainer = patched
    return patched


def _pairs(name: str, of_rows: Tensor) -> Tensor:  # [2, P]
    """Rows 0..P-1, which are chosen, and rows P..2P-1, which are rejected."""
    rows = of_rows.shape[0]
    if rows % 2:
        raise ValueError(f"{name}: expected chosen rows and as many rejected ones, got {rows} rows")
    return of_rows.view(2, -1)


def _mean(logits: Tensor) -> Tensor:  # scalar
    """In float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # A sequence at a time, since a mean in another dtype copies what it is of on a CPU.
    return torch.stack([of_sequence.mean(dtype=dtype) for of_sequence in logits]).mean()
