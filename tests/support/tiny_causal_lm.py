"""A language model with the interface of those of transformers, for any dtype."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class TinyCausalLM(nn.Module):
    """Records the names of each call's keywords in ``calls``."""

    def __init__(self, vocabulary: int = 61, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight)
        self.calls: list[set[str]] = []

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        self.calls.append({*kwargs})
        hidden, _ = self.recurrence(self.embedding(input_ids))
        return SimpleNamespace(logits=self.lm_head(hidden))
