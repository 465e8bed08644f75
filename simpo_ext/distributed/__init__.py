"""SimPO across ranks.

The denominators of a mean over the pairs of all ranks: :func:`global_normalizer`. And
log-probabilities of a vocabulary whose logits, or whose lm_head, are divided over the ranks of a
group: :func:`vocab_parallel_token_logps` and :func:`vocab_parallel_linear_token_logps`. The loss is
:func:`simpo_ext.simpo_loss_from_token_logps` of what they return.
"""

from __future__ import annotations

from .normalizer import PairCounts, global_normalizer
from .vocab_parallel import (
    VocabShard,
    vocab_parallel_linear_token_logps,
    vocab_parallel_token_logps,
)

__all__ = [
    "PairCounts",
    "VocabShard",
    "global_normalizer",
    "vocab_parallel_linear_token_logps",
    "vocab_parallel_token_logps",
]
