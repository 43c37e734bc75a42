"""transformers' own models, tiny and random, as the reference for ours."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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

#: Defaults that lie outside of so small a vocabulary.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Model = TypeVar("Model", bound=nn.Module)

disable_progress_bar()


def peer(family: str, dtype: torch.dtype = torch.float32, **keys: Any) -> PreTrainedModel:
    """transformers' model of a family, with weights that make every part of it matter: no zero bias, no norm of one."""
    config = AutoConfig.for_model(family, **{**SHAPE, **dict.fromkeys(TOKEN_IDS), **keys})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    for weight in stored(model).values():
        weight.data = weight.data.to(dtype)  # of those that transformers keeps in float32
    return randomize(model)


@torch.no_grad()
def randomize(model: Model) -> Model:
    """Fills all weights: matrices 0.3 N, biases N, norms 1 + 0.3 N."""
    for name, weight in stored(model).items():
        draw = torch.randn(weight.shape, generator=torch_generator(0, name))
        weight.copy_(1 + 0.3 * draw if "norm" in name else draw if weight.dim() == 1 else 0.3 * draw)
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a folder has of a model: its parameters, and the buffers that are no tables of positions."""
    kept = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: each for name, each in model.named_buffers() if name in kept}


class Doubled(TorchFunctionMode):
    """Keeps numbers in float64 that transformers would compute in float32: norms, routers, rotations, softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.polar:  # whose last bits are not those of cosines and sines
            return torch.complex(args[0] * args[1].cos(), args[0] * args[1].sin())
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            kwargs = {key: torch.float64 if each is torch.float32 else each for key, each in kwargs.items()}
        return func(*args, **kwargs)


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
    return differentiable(model, tokens)


def differentiable(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The same with a graph for gradients; of a model in float64, in float64 throughout."""
    with Doubled() if model.dtype == torch.float64 else contextlib.nullcontext():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits
