"""Shares of layers on several processes, with their gradients, beside whole layers on one, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from drawn_decoder import drawn
from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig, LatentConfig
from penstock.models.decoder import Decoder
from penstock.models.shares import Share, parameter_cuts, with_divided_layers
from penstock.parallel.tensor_gradients import found_in_parts, join_layers
from penstock.parallel.world import World
from penstock.testing.ranks import agreed

PLAIN = {
    "vocabulary": 19,
    "hidden": 8,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "ffn": 12,
    "context": 8,
    "init_std": 0.3,
}

#: Of each the blocks are of other kinds.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads, normed": {"qk_norm": "head", "tied": True},
    "normed over all heads": {"qk_norm": "width", "norm_place": "after", "window": 3},
    "offset norms around, caps, sinks": {
        "norm": "rms_offset",
        "norm_place": "both",
        "qk_norm": "head",
        "sinks": True,
        "attention_cap": 5.0,
    },
    "biases, blocks in parallel, no gate": {
        "norm": "layer",
        "norm_bias": True,
        "norm_place": "parallel",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": "gelu",
        "learned_positions": True,
        "residual_scale": 0.5,
    },
    "latent": {"latent": LatentConfig(rank=6, rotated=2, plain=4, value=4, query_rank=5), "qkv_bias": True},
}
TOKENS = torch.arange(14).view(2, 7) * 5 % 19


def shape(kind: str) -> DecoderConfig:
    return DecoderConfig(**{**PLAIN, **SHAPES[kind]})


def gradients(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and what a loss that treats none alike makes of the parameters."""
    logits = model.logits(model(TOKENS, CausalRows.of(7)).hidden)
    weights = torch.randn(logits.shape, generator=torch_generator(0, "test/loss"), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def faults(world: World, kind: str) -> list[str]:
    whole, share = drawn(shape(kind)), Share(world.rank, world.size)
    part = Decoder(with_divided_layers(whole.config, world.size)).double()
    cuts = parameter_cuts(whole, part, share)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            cut = cuts.get(name)
            parameter.copy_(whole.get_parameter(name) if cut is None else cut.of(whole.get_parameter(name)))
    join_layers(part, dist.group.WORLD)
    (wanted, theirs), (found, ours) = gradients(whole), gradients(part)
    told = [] if torch.allclose(found, wanted, rtol=1e-12, atol=1e-12) else ["the logits"]
    if ours.keys() != theirs.keys():
        told.append("what has a gradient")
    in_parts = found_in_parts(part)
    for name, gradient in ours.items():
        if name in cuts:
            right = cuts[name].of(theirs[name])
        else:
            right = theirs[name]
            if name in in_parts:
                dist.all_reduce(gradient)
        if not torch.allclose(gradient, right, rtol=1e-10, atol=1e-10):
            told.append(f"{kind}: {name}")
    return told


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shares_find_the_gradients_of_whole_layers(size):
    """Heads and feed-forward blocks of every kind; four processes have a head each, of models with as many of keys."""

    def work(world: World) -> list[str]:
        torch.set_num_threads(1)
        return [fault for kind in SHAPES if size == 2 or kind == "latent" for fault in faults(world, kind)]

    assert agreed(size, work) == [[]] * size
