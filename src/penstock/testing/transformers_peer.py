"""transformers' own models, tiny and random, as the reference for ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from penstock.core.randomness import torch_generator
from penstock.models.attention import CachedRows, CausalRows
from penstock.models.decoder import Decoder

#: Every family takes its own keys of these.
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

Model = TypeVar("Model", bound=nn.Module)

disable_progress_bar()


def peer(family: str, dtype: torch.dtype = torch.float32, **keys: Any) -> PreTrainedModel:
    """transformers' model of a family, with weights that make every part of it matter: no zero bias, no norm of one."""
    config = AutoConfig.for_model(family, **{**SHAPE, **keys})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    return randomize(model)


@torch.no_grad()
def randomize(model: Model) -> Model:
    """Fills all parameters: matrices 0.3 N, biases N, norms 1 + 0.3 N."""
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=torch_generator(0, name))
        parameter.copy_(1 + 0.3 * draw if "norm" in name else draw if parameter.dim() == 1 else 0.3 * draw)
    return model


def double(family: str, **keys: Any) -> PreTrainedModel:
    """The same in float64, with those parts replaced that transformers always computes in float32."""
    model = peer(family, torch.float64, **keys)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm.__get__(module)
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = _route.__get__(module)
    return model


def _norm(self: Any, x: Tensor) -> Tensor:
    normed: Tensor = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return normed


def _route(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    weights, experts = scores.softmax(-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return scores, weights, experts


def prompt(rows: int = 2, length: int = 13) -> Tensor:
    """Token ids, int64 [rows, length]."""
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch_generator(0, "prompt"))


@torch.no_grad()
def whole(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of the prompt at once."""
    return decoder.logits(decoder(tokens, CausalRows.of(tokens.shape[1])).hidden)


@torch.no_grad()
def stepwise(decoder: Decoder, tokens: Tensor, first: int = 4) -> Tensor:
    """The same logits with a cache: ``first`` tokens, then one by one."""
    cache = CachedRows()
    pieces = (tokens[:, :first], *torch.split(tokens[:, first:], 1, dim=1))
    return torch.cat([decoder.logits(decoder(piece, cache.extend(piece.shape[1])).hidden) for piece in pieces], 1)


def published(folder: Path) -> PreTrainedModel:
    """transformers' model of a folder; every tensor of it must have a place, and every place a tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@torch.no_grad()
def expected(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """transformers' logits of the prompt at once."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits
