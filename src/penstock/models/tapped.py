"""A decoder of which states between its layers are wanted."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder, Layer


class TappedDecoder(Decoder):
    """``target`` itself, with its weights and not with copies, whose :meth:`trunk` also gives the hidden states behind
    its first ``layers`` ones, which are not all."""

    def __init__(self, target: Decoder, layers: int) -> None:
        nn.Module.__init__(self)
        self.config, self.tap = target.config, layers
        self.embedding, self.layers, self.rotary = target.embedding, target.layers, target.rotary
        if target.config.learned_positions:
            self.position_embedding = target.position_embedding
        self.norm, self.head = target.norm, target.head

    def trunk(self, tokens: Tensor, context: AttentionContext) -> tuple[Tensor, ...]:
        """As of the target, and the hidden states [*T, hidden] behind the first layers."""
        tapped, rotary, _ = self.through(self.layers[: self.tap], tokens, context)
        x = tapped
        for layer in self.layers[self.tap : -1]:
            x, _ = layer(x, rotary, context)
        return x, cast(Layer, self.layers[-1]).attend(x, rotary, context), tapped

    def tip(self, x: Tensor, attended: Tensor, *tapped: Tensor) -> Tensor:
        return super().tip(x, attended)
