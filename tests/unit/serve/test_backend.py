"""Which attention backend a model gets on a device that need not be there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.paged import cache_shape
from penstock.serve.backend import _chosen
from penstock.serve.config import EngineConfig

SHAPE = {"vocabulary": 61, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 128, "ffn": 32}
LATENT = {"rank": 512, "rotated": 64, "plain": 64, "value": 64}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton and flashinfer, as far as anybody asks."""
    there = importlib.util.find_spec
    found = importlib.util.find_spec("torch")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: found if name in ("triton", "flashinfer") else there(name, *rest),
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "name"),
    [
        ({}, torch.bfloat16, "flashinfer"),
        ({"window": 5, "windowed_layers": (1,)}, torch.bfloat16, "flashinfer"),
        ({"attention_cap": 50.0}, torch.bfloat16, "invariant"),
        ({"sinks": True, "window": 5, "windowed_layers": (1,)}, torch.bfloat16, "invariant"),
        ({"chunked": True, "window": 5, "windowed_layers": (1,)}, torch.float16, "invariant"),
        ({"head_dim": 80}, torch.bfloat16, "invariant"),
        ({"sinks": True}, torch.float32, "invariant"),
        ({"sinks": True}, torch.float64, "reference"),
        ({"kv_heads": 4, "latent": LATENT}, torch.bfloat16, "invariant"),
        ({"kv_heads": 4, "latent": {**LATENT, "rank": 128}}, torch.float32, "invariant"),
        # What a tile of these would hold does not fit in a multiprocessor.
        ({"kv_heads": 4, "latent": LATENT}, torch.float32, "reference"),
        ({"kv_heads": 4, "latent": {**LATENT, "rank": 1024}}, torch.bfloat16, "reference"),
    ],
)
def test_on_cuda_a_model_gets_kernels_that_know_its_attention(kind: dict, dtype: torch.dtype, name: str) -> None:
    config = DecoderConfig(**{**SHAPE, **kind})
    assert _chosen(EngineConfig(), cache_shape(config, 16, dtype, torch.device("cuda"))).policy_name == name
