"""SimPO across ranks.

:func:`global_normalizer` computes the denominators of a mean over the pairs of all ranks.

:func:`vocab_parallel_token_logps` and :func:`vocab_parallel_linear_token_logps` compute
log-probabilities when the logits or lm_head are sharded over the vocabulary. Pass their result to
:func:`simpo_ext.simpo_loss_from_token_logps` for the loss.
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
