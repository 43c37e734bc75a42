"""Heads for the tokens further ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Guess, Head, HeadModule
from penstock.policy import policy


class MedusaHeads(HeadModule):
    """A residual block for each of ``heads`` tokens ahead, over the target's last hidden states [*T, hidden].

    Args:
        shape: of the target.
        heads: how many.
    """

    def __init__(self, shape: DecoderConfig, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(shape.hidden, shape.hidden) for _ in range(heads))

    @torch.no_grad()
    def initialize(self, target: Decoder, seed: int) -> None:
        for parameter in self.parameters():
            parameter.zero_()  # each head says at first what the target said of the token before

    @property
    def reach(self) -> int:
        return len(self.blocks)

    def ahead(self, hidden: Tensor, depth: int) -> Tensor:
        return hidden + F.silu(self.blocks[depth](hidden))

    def guesses(self, target: Decoder, hidden: Tensor, tokens: Tensor, context: AttentionContext) -> Iterator[Guess]:
        for depth in range(self.reach):
            yield Guess(self.ahead(hidden, depth), depth + 1)


@policy("model.head", "medusa")
class Medusa(Head):
    """Several heads on the last hidden state: each guesses a token further ahead, all of them at once (as Medusa).

    Drafting costs a small matrix and the target's output matrix for each token, and no pass of any model; but a guess
    does not know which tokens were guessed before it. From the published method: the residual blocks, and that the
    target itself is not changed. Ours: the heads share the target's output matrix, and learn what the target says.

    Attributes:
        heads: how many tokens are guessed.
    """

    heads: Annotated[int, Field(ge=1, le=16)] = 4

    def build(self, shape: DecoderConfig) -> MedusaHeads:
        return MedusaHeads(shape, self.heads)
