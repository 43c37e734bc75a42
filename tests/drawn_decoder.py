"""A model in fp64 of which nothing is 0 or 1, where some mistakes would not show."""

from __future__ import annotations

import torch

from penstock.core.randomness import torch_generator
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder


def drawn(config: DecoderConfig) -> Decoder:
    """Its parameters depend on their names alone."""
    model = Decoder(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_generator(0, f"test/{name}")) * 0.4 + 0.1)
    return model
