"""A small byte-level transformer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from .batches import VOCAB_SIZE


class Block(nn.Module):
    """Pre-norm causal self-attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] to [B, T, width]."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width / heads]
        # Rows are padded on the right, so the causal mask keeps padding from scored tokens.
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ByteTransformer(nn.Module):
    """Next-byte logits from bytes, with begin, end and padding tokens."""

    def __init__(self, context: int, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, width)
        self.positions = nn.Embedding(context, width)
        # Attention learns to find the preceding bytes only after many steps. With a causal
        # convolution, the model learns to spell within the minute that this demo takes.
        self.nearby = nn.Conv1d(width, width, kernel_size=4)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB_SIZE, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [B, T] to logits [B, T, VOCAB_SIZE]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        x = x + self.nearby(pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
