"""A decoder of which states between its layers are wanted."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder
from penstock.models.pieces import EAGER, Pieces


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

    def trunk(self, tokens: Tensor, context: AttentionContext, pieces: Pieces = EAGER) -> tuple[Tensor, ...]:
        """As of the target, and the hidden states [*T, hidden] behind the first layers."""
        found: tuple[Tensor, ...] = ()
        for place, found in enumerate(pieces.walk(self, tokens, context)):
            if place == self.tap:
                tapped = found[0]
        return *found, tapped

    def tip(self, x: Tensor, attended: Tensor, *tapped: Tensor) -> Tensor:
        return super().tip(x, attended)
