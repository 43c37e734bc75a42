"""An exit behind the first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, FeedForward
from penstock.models.heads.contract import Guess, Head, HeadModule
from penstock.models.norms import norm
from penstock.policy import policy


class Exit(HeadModule):
    """What stands between the first ``layers`` and the target's own head: a feed-forward block of its own, and a norm.

    Args:
        shape: of the target.
        layers: of the target, that come first.
        width: of the block.
    """

    def __init__(self, shape: DecoderConfig, layers: int, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.block_norm, self.block, self.norm = norm(shape), FeedForward(shape, width), norm(shape)

    @torch.no_grad()
    def initialize(self, target: Decoder, seed: int) -> None:
        for name, parameter in self.block.named_parameters():
            draw = torch.randn(parameter.shape, generator=torch_generator(seed, f"head/{name}"))
            parameter.copy_(target.config.init_std * draw)
        # Nothing is added at first: the exit reads the hidden states as the last layer's are read.
        self.block.down.weight.zero_()
        self.norm.load_state_dict(target.norm.state_dict())

    def decoder(self, target: Decoder) -> Decoder:
        return ExitDecoder(target, self)

    def guesses(self, target: Decoder, hidden: Tensor, tokens: Tensor, context: AttentionContext) -> Iterator[Guess]:
        yield Guess(self.decoder(target)(tokens, context).hidden, 0)


class ExitDecoder(Decoder):
    """The first layers of ``target`` and its ``exit`` as a model: with the weights of both, not with copies."""

    def __init__(self, target: Decoder, exit: Exit) -> None:
        nn.Module.__init__(self)
        self.config = target.config.model_copy(update={"layers": exit.layers})
        self.embedding, self.layers, self.rotary = target.embedding, target.layers[: exit.layers], target.rotary
        if target.config.learned_positions:
            self.position_embedding = target.position_embedding
        self.block_norm, self.block = exit.block_norm, exit.block
        self.norm, self.head = exit.norm, target.head

    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x + self.block(self.block_norm(x)))


@policy("model.head", "early_exit", papers=[162])
class EarlyExit(Head):
    """The first layers of the target itself, and a small exit behind them that is trained to say what the whole model
    would.

    Drafting needs no weights but the exit's, and no cache: keys and values of the first layers lie where the target
    keeps them, also those of drafted tokens, which the target computes once more with all of its layers. From the
    paper: the first N layers draft, by an exit that is distilled from the whole model. Ours: the exit is a feed-forward
    block without attention, which would need a cache, and it shares the target's output matrix.

    Attributes:
        layers: how many layers come first.
        width: of the exit's block, in multiples of the hidden size.
    """

    layers: Annotated[PositiveInt, Field(examples=[1])]
    width: PositiveInt = 2

    def build(self, shape: DecoderConfig) -> Exit:
        if self.layers > shape.layers:
            raise UsageError(
                f"an exit behind {self.layers} layers is not for a model that has {shape.layers}",
                hint="Set fewer: head.layers.",
            )
        return Exit(shape, self.layers, self.width * shape.hidden)
