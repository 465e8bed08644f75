"""Models of many families, and models with unusual logits or heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from support.trl_training import SMALL, VOCABULARY, make_model

Build = Callable[[], Any]


def family(name: str, config: str, **options: Any) -> Build:
    return lambda: make_model(getattr(hf, name), getattr(hf, config), **options)


_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

# The trainer knows what these families compute after lm_head.
FUSED: dict[str, Build] = {
    "llama": family("LlamaForCausalLM", "LlamaConfig"),
    "llama tied": family("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True),
    "gpt2, tied": family("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "phi, a bias": family("PhiForCausalLM", "PhiConfig"),
    "gemma2, a softcap": family(
        "Gemma2ForCausalLM", "Gemma2Config",
        final_logit_softcapping=1.5, head_dim=8, query_pre_attn_scalar=8,
        attn_implementation="eager",
    ),
    "gemma2 without its softcap": family(
        "Gemma2ForCausalLM", "Gemma2Config",
        final_logit_softcapping=None, head_dim=8, query_pre_attn_scalar=8,
        attn_implementation="eager",
    ),
    "cohere, a scale": family("CohereForCausalLM", "CohereConfig", logit_scale=0.25),
    "granite, a scale": family("GraniteForCausalLM", "GraniteConfig", logits_scaling=4.0),
    "mixtral": family("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **_EXPERTS),
    "qwen3 moe": family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        num_experts=4, moe_intermediate_size=24, head_dim=8, **_EXPERTS,
    ),
}  # fmt: skip
CAPPED = {"gemma2, a softcap"}
EXPERTS = {"mixtral", "qwen3 moe"}

# The configs of these families do not describe the logits, or their head has another name.
OTHERS: dict[str, Build] = {
    "gpt neox, embed_out": family("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "opt": family("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "bloom": family("BloomForCausalLM", "BloomConfig", n_layer=2, n_head=4),
    "nanochat, a softcap": family(
        "NanoChatForCausalLM", "NanoChatConfig", final_logit_softcapping=1.5
    ),
    # Here logits_scaling is a factor. Granite's is a divisor.
    "hyperclovax": family("HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", logits_scaling=4.0),
    "granite moe": family(
        "GraniteMoeForCausalLM", "GraniteMoeConfig",
        logits_scaling=4.0, num_local_experts=4, **_EXPERTS,
    ),
    "falcon h1, a multiplier": family(
        "FalconH1ForCausalLM", "FalconH1Config",
        lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "recurrent gemma, a softcap of another name": family(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        logits_soft_cap=1.5, lru_width=32, num_hidden_layers=3,
    ),
    "a llama whose config names what it does not do": family(
        "LlamaForCausalLM", "LlamaConfig",
        final_logit_softcapping=1.5, logit_scale=0.25, logits_scaling=4.0, lm_head_multiplier=3.0,
        output_multiplier=2.0, logits_soft_cap=1.5,
    ),
}  # fmt: skip


# ---- models that change the logits of the head -----------------------------------------------


class _Changed(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out

    def change(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


class Affine(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits * 2 + 1


class ScaledInPlace(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits.mul_(2.0)


class Sliced(_Changed):
    """Like a model whose head is padded to a round number."""

    def change(self, logits: Tensor) -> Tensor:
        return logits[..., : VOCABULARY - 8]


class Masked(_Changed):
    """Like a model that never generates image tokens."""

    def change(self, logits: Tensor) -> Tensor:
        logits[..., 100:180] = torch.finfo(logits.dtype).min  # bytes that the text does not contain
        return logits


class Rolled(_Changed):
    """Logits of the right shape and head, at other positions."""

    def change(self, logits: Tensor) -> Tensor:
        return logits.roll(1, dims=1)


class ScaledInTraining(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits * 0.5 if self.training else logits


class ScaledWhereLong(_Changed):
    """A short probe does not show the scale."""

    def change(self, logits: Tensor) -> Tensor:
        return logits * 0.5 if logits.shape[1] > 16 else logits


class ScaledByAParameter(_Changed):
    """The parameter has a gradient of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def change(self, logits: Tensor) -> Tensor:
        return logits * self.temperature


class _Headed(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=self.head_of(hidden))

    def head_of(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class NeverCalled(_Headed):
    def head_of(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.lm_head.weight)


class CalledTwice(_Headed):
    def head_of(self, hidden: Tensor) -> Tensor:
        return 0.5 * (self.lm_head(hidden) + self.lm_head(hidden.flip(-1)))


class CalledTwiceAndOnceForNothing(_Headed):
    def head_of(self, hidden: Tensor) -> Tensor:
        self.lm_head(hidden * 3.0)
        return self.lm_head(hidden)


class CalledInParts(_Headed):
    """Like a model that saves memory."""

    def head_of(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.lm_head(part) for part in hidden.chunk(3, dim=1)], dim=1)


class CalledFlat(_Headed):
    def head_of(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


class PlusAnother(_Headed):
    """Logits of the head plus others."""

    def head_of(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) + F.linear(hidden, self.model.embed_tokens.weight)


# Only the logits give the right results.
CHANGED = (
    *(Affine, Sliced, Masked, Rolled, ScaledByAParameter),
    *(NeverCalled, CalledTwice, PlusAnother),
)
# Hidden states could give the right results.
UNUSUAL = (
    *(ScaledInPlace, ScaledInTraining, ScaledWhereLong),
    *(CalledTwiceAndOnceForNothing, CalledInParts, CalledFlat),
)


# ---- heads that are not a plain nn.Linear ----------------------------------------------------


class RoundedLinear(nn.Linear):
    """Like a layer with a quantized weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        rounded = self.weight + ((self.weight * 16).round() / 16 - self.weight).detach()
        return F.linear(hidden, rounded, self.bias)


def _with_head(change: Callable[[Any], None]) -> Build:
    def build() -> Any:
        model = make_model()
        change(model)
        return model

    return build


def _rounded(model: Any) -> None:
    head = RoundedLinear(SMALL["hidden_size"], VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def _sequential(model: Any) -> None:
    torch.manual_seed(1)
    narrow = nn.Linear(SMALL["hidden_size"], SMALL["hidden_size"])
    model.lm_head = nn.Sequential(narrow, nn.SiLU(), model.lm_head)


def _parametrized(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(1.5)


class _Double:
    """A hook that can be copied with the model."""

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return 2.0 * output


class _Halve:
    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        return (0.5 * inputs[0],)


class _PatchedForward:
    """Replaces a module's forward, as some libraries do."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head.weight) * 1.5


def _patched(model: Any) -> None:
    model.lm_head.forward = _PatchedForward(model.lm_head)


HEADS: dict[str, Build] = {
    "a subclass that rounds its weight": _with_head(_rounded),
    "a sequence of modules": _with_head(_sequential),
    "a parametrized weight": _with_head(_parametrized),
    "a hook after it": _with_head(lambda m: m.lm_head.register_forward_hook(_Double())),
    "a hook before it": _with_head(lambda m: m.lm_head.register_forward_pre_hook(_Halve())),
    "another forward": _with_head(_patched),
}
