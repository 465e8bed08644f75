"""SimPO across ranks.

Log-probabilities of a vocabulary whose logits, or whose lm_head, are divided over the ranks of a
group: :func:`vocab_parallel_token_logps` and :func:`vocab_parallel_linear_token_logps`. The loss is
:func:`simpo_ext.simpo_loss_from_token_logps` of what they return.
"""

from __future__ import annotations

from ._vocab_parallel import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)

__all__ = [
    "VocabShard",
    "vocab_parallel_linear_token_logps",
    "vocab_parallel_token_logps",
]
