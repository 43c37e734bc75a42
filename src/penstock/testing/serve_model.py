"""The small model that the engine's suites serve."""

from __future__ import annotations

import functools

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder

SHAPE = DecoderConfig(
    vocabulary=50,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    context=96,
    tied=False,
    init_std=0.3,
)


@functools.cache
def small_model() -> Decoder:
    """A decoder with random weights that are large enough for its choices to be clear."""
    return Decoder(SHAPE).initialize(0).eval()
