"""The head that predicts whether a drafted token will be accepted, and the pair of models that it is trained for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.randomness import torch_generator
from penstock.models.beside import Beside
from penstock.models.decoder import Decoder
from penstock.models.quantized import rows_of

#: Residual blocks of a head.
BLOCKS = 3


class AcceptanceHead(nn.Module):
    """Predicts the probability that a drafted token is accepted, if all those before it were.

    From the paper's code: residual blocks x + SiLU(Wx), and a linear layer. Ours: what they read. There, it is the
    hidden state of the drafted token itself, for which the drafting model has to compute that token, and so to draft
    the next one. Here, it is the hidden state that the token was drafted from, the token's embedding, and its score: so
    what is predicted of a token is known as soon as that is drafted.

    Args:
        hidden: the width of the drafting model.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fuse = nn.Linear(2 * hidden + 1, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(BLOCKS))
        self.out = nn.Linear(hidden, 1)

    @torch.no_grad()
    def initialize(self, seed: int) -> AcceptanceHead:
        """Fills the weights: at first it predicts 1/2 of everything."""
        for name, parameter in self.named_parameters():
            parameter.zero_()
            if parameter.dim() > 1 and not name.startswith("out"):
                draw = torch.randn(parameter.shape, generator=torch_generator(seed, f"acceptance/{name}"))
                parameter.copy_(draw / parameter.shape[1] ** 0.5)
        return self

    def forward(self, draft: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logits [*T] of the probabilities that ``tokens`` (integers [*T]) are accepted.

        Args:
            draft: the model that drafted them.
            hidden: its hidden states [*T, hidden] that they were drafted from.
            tokens: what was drafted.
        """
        embedded = F.rms_norm(draft.embedding(tokens), hidden.shape[-1:])
        score = (hidden * rows_of(draft.head, tokens, hidden.dtype)).sum(-1, keepdim=True)
        x = self.fuse(torch.cat([hidden, embedded, score], -1))
        for block in self.blocks:
            x = x + F.silu(block(x))
        logits: Tensor = self.out(x).squeeze(-1)
        return logits


class Pair(Beside):
    """A model that drafts, the target that it drafts for, and the head that predicts what that accepts.

    Attributes:
        draft, target: the models, frozen.
        head: the weights.
        names: what the draft and the target are called.
        config: the target's.
    """

    draft: Decoder
    target: Decoder

    def __init__(
        self, draft: Decoder, target: Decoder, head: AcceptanceHead, names: tuple[str, str] = ("", "")
    ) -> None:
        super().__init__(target.config, draft=draft, target=target)
        self.head, self.names = head, names

    @classmethod
    def new(cls, draft: Decoder, target: Decoder, seed: int, names: tuple[str, str] = ("", "")) -> Pair:
        """One to be trained."""
        weight = draft.like
        return cls(draft, target, like(draft).initialize(seed).to(weight.device, weight.dtype), names)

    def holding(self, weights: Mapping[str, Tensor]) -> Pair:
        head = like(self.draft)
        head.load_state_dict({name.removeprefix("head."): each for name, each in weights.items()}, assign=True)
        return Pair(self.draft, self.target, head, self.names)


def like(draft: Decoder) -> AcceptanceHead:
    """A head for what ``draft`` drafts, with weights of any value."""
    return AcceptanceHead(draft.config.hidden)
