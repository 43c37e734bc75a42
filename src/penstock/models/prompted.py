"""A decoder that is also given vectors in the places of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penstock.models.decoder import Decoder


class PromptedDecoder(Decoder):
    """``target`` itself, with its weights and not with copies, to which the tokens -1, -2 and so on are the ``prompts``
    [n, hidden]. Of any other token it makes what the target does, bit for bit."""

    def __init__(self, target: Decoder, prompts: Tensor) -> None:
        nn.Module.__init__(self)
        self.config = target.config
        self.embedding, self.layers, self.rotary = target.embedding, target.layers, target.rotary
        if target.config.learned_positions:
            self.position_embedding = target.position_embedding
        self.norm, self.head = target.norm, target.head
        self.prompts = prompts  # a tensor, and no weight of the model, whose names stay those of the target's

    def embedded(self, tokens: Tensor) -> Tensor:
        known, own = (tokens >= 0).unsqueeze(-1), self.prompts[(-1 - tokens).clamp(min=0)]
        return torch.where(known, super().embedded(tokens.clamp(min=0)), own)
