"""States of tokens to come, made of those of the text, between the target's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Guess, Head, HeadModule
from penstock.models.heads.pseudo_rows import PseudoRows
from penstock.policy import policy


class Transfer(HeadModule):
    """A matrix for each of ``tokens`` to come, from the hidden state of a text behind the target's first ``layers`` to
    a pseudo hidden state in that token's place, which goes through the layers that are left.

    Args:
        shape: of the target.
        layers: of the target, that come first.
        tokens: how many tokens are guessed.
    """

    def __init__(self, shape: DecoderConfig, layers: int, tokens: int) -> None:
        super().__init__()
        self.layers = layers
        self.transfers = nn.ModuleList(nn.Linear(shape.hidden, shape.hidden) for _ in range(tokens))

    @torch.no_grad()
    def initialize(self, target: Decoder, seed: int) -> None:
        for each in self.transfers:
            assert isinstance(each, nn.Linear)
            nn.init.eye_(each.weight)  # the text's own last token, in the place of each that is to come
            each.bias.zero_()

    @property
    def reach(self) -> int:
        return len(self.transfers)

    def transfer(self, states: Tensor) -> Tensor:
        return torch.stack([each(states) for each in self.transfers], -2)

    def passed(self, target: Decoder, states: Tensor, context: AttentionContext) -> Tensor:
        rotary = target.rotary(context.positions, states.dtype)
        for layer in target.layers[self.layers :]:
            states, _ = layer(states, rotary, context)
        return target.finish(states)

    def guesses(self, target: Decoder, hidden: Tensor, tokens: Tensor, context: AttentionContext) -> Iterator[Guess]:
        with torch.no_grad():
            states = target.embed(tokens, context.positions)
            rotary = target.rotary(context.positions, states.dtype)
            for layer in target.layers[: self.layers]:
                states, _ = layer(states, rotary, context)
        # Of a row of T tokens: the text, then the first token behind each of them, then the second one, ...
        pseudo = self.transfer(states).transpose(-3, -2).flatten(-3, -2)
        every = PseudoRows.of(context.positions, self.reach, target.config.context)
        passed = self.passed(target, torch.cat([states, pseudo], -2), every)
        for depth, guessed in enumerate(passed.chunk(1 + self.reach, -2)[1:]):
            yield Guess(guessed, depth + 1)


@policy("model.head", "hidden_transfer", papers=[407])
class HiddenTransfer(Head):
    """Makes hidden states of the tokens to come, between the target's layers, and lets those pass the layers that are
    left, all at once, with the text's keys and values.

    Drafting takes one pass of the last layers and the output matrix, for all tokens that are guessed, and no cache:
    keys and values of pseudo states lie where the target will keep those of the tokens themselves. The engine keeps the
    hidden states behind the first layers. From the paper: the learned matrices at an intermediate layer, and that
    pseudo states pass the remaining layers together with the context, which tells them more than a head behind the last
    layer could know. Ours: a matrix with a bias, which begins as the identity; and it learns what the target says. Not
    built: that one pass verifies candidates and generates the next ones, with pseudo states behind every candidate.
    Here drafting is a pass of its own, of the last layers alone, behind the last token that the target has computed; so
    the first pseudo state stands in the place of the newest token, which is known by then.

    Attributes:
        left: how many of the target's layers, the last ones, the pseudo states pass.
        tokens: how many tokens are guessed.
    """

    left: Annotated[PositiveInt, Field(examples=[1])]
    tokens: Annotated[int, Field(ge=1, le=16)] = 3

    def build(self, shape: DecoderConfig) -> Transfer:
        if self.left >= shape.layers:
            raise UsageError(
                f"a transfer before the last {self.left} layers is not for a model that has {shape.layers}",
                hint="Set fewer: head.left.",
            )
        return Transfer(shape, shape.layers - self.left, self.tokens)
