"""A layer that goes on with hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.randomness import torch_generator
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, Layer
from penstock.models.heads.contract import Continuing, Guess, Head, HeadModule
from penstock.models.norms import norm
from penstock.models.rotary import Rotaries
from penstock.policy import policy


class EagleLayer(HeadModule):
    """A decoder layer over tokens and, for each, the target's hidden state after the token before it. What it gives
    stands in for the target's hidden state after the token itself.

    Args:
        shape: of the target.
    """

    def __init__(self, shape: DecoderConfig) -> None:
        super().__init__()
        self.shape = shape.model_copy(update={"layers": 1, "moe": None})
        self.fuse = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.layer, self.norm = Layer(self.shape, 0), norm(shape)
        self.rotary = Rotaries(self.shape, shape.context)

    @torch.no_grad()
    def initialize(self, target: Decoder, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                draw = torch.randn(parameter.shape, generator=torch_generator(seed, f"head/{name}"))
                parameter.copy_(target.config.init_std * draw)
        # At first it says what the target said of the token before.
        hidden = target.config.hidden
        self.fuse.weight.copy_(torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1))
        self.norm.load_state_dict(target.norm.state_dict())

    def continuing(self, target: Decoder) -> EagleDecoder:
        return EagleDecoder(target, self)

    def guesses(self, target: Decoder, hidden: Tensor, tokens: Tensor, context: AttentionContext) -> Iterator[Guess]:
        before = F.pad(hidden, (0, 0, 1, 0))[..., :-1, :] * (context.positions > 0).unsqueeze(-1)
        decoder = self.continuing(target)
        decoder.before = before.to(hidden.dtype)
        yield Guess(decoder(tokens, context).hidden, 0)


class EagleDecoder(Continuing):
    """A head as a model of one layer: with the weights of both, not with copies."""

    def __init__(self, target: Decoder, head: EagleLayer) -> None:
        nn.Module.__init__(self)
        self.config = head.shape
        self.embedding, self.head, self.norm, self.rotary = target.embedding, target.head, head.norm, head.rotary
        if target.config.learned_positions:
            self.position_embedding = target.position_embedding
        self.fuse, self.layers = head.fuse, nn.ModuleList([head.layer])

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        fused: Tensor = self.fuse(torch.cat([super().embed(tokens, positions), self.before], -1))
        return fused


@policy("model.head", "eagle")
class Eagle(Head):
    """One layer that goes on with the target's hidden states, token by token (as EAGLE).

    Each step takes a token and the hidden state after the one before it, the target's or, of drafted tokens, its own.
    So a guess knows which tokens were drafted before it. Drafting takes a pass of one layer and the output matrix for
    each token, and a cache of one layer. From the published method: the two inputs, the layer, and that the target's
    embedding and output matrix are used. Ours: it learns what the target says, and not also its hidden states.
    """

    def build(self, shape: DecoderConfig) -> EagleLayer:
        return EagleLayer(shape)
