"""Prompt tokens: embeddings that the model itself computes behind a text, to guess what comes there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from penstock.core.randomness import torch_generator
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Guess, Head, HeadModule
from penstock.models.heads.pseudo_rows import PseudoRows
from penstock.models.prompted import PromptedDecoder
from penstock.policy import policy


class PromptTokens(HeadModule):
    """Embeddings of ``tokens`` prompt tokens, [tokens, hidden]: the only weights that are trained.

    Args:
        shape: of the target.
        tokens: how many.
    """

    def __init__(self, shape: DecoderConfig, tokens: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(tokens, shape.hidden))

    @torch.no_grad()
    def initialize(self, target: Decoder, seed: int) -> None:
        # As if they were tokens of the vocabulary, whose embeddings have this mean and spread.
        known = target.embedding(torch.arange(target.config.vocabulary, device=target.like.device))
        known = known.to(torch.promote_types(known.dtype, torch.float32))
        draw = torch.randn(self.prompts.shape, generator=torch_generator(seed, "head/prompts"))
        drawn = known.mean(0) + known.std(0) * draw.to(known)
        self.prompts.copy_(target.config.embedding_scale * drawn)

    @property
    def reach(self) -> int:
        return len(self.prompts)

    def prompted(self, target: Decoder) -> Decoder:
        return PromptedDecoder(target, self.prompts[:])

    def guesses(self, target: Decoder, hidden: Tensor, tokens: Tensor, context: AttentionContext) -> Iterator[Guess]:
        # Of a row of T tokens: the text, then the first prompt token behind each of them, then the second one, ...
        numbers = -1 - torch.arange(self.reach, device=tokens.device)
        behind = numbers.repeat_interleave(tokens.shape[-1]).expand(*tokens.shape[:-1], -1)
        every = PseudoRows.of(context.positions, self.reach, target.config.context)
        passed = self.prompted(target)(torch.cat([tokens, behind], -1), every).hidden
        for depth, guessed in enumerate(passed.chunk(1 + self.reach, -2)[1:]):
            yield Guess(guessed, depth + 1)


@policy("model.head", "ppd", papers=[333])
class ParallelPrompts(Head):
    """Prompt tokens: trained embeddings, computed by the frozen model itself behind a token of the text, which guess
    the tokens to come (parallel prompt decoding).

    Drafting takes no pass of its own: prompt tokens are further rows of the step that verifies, behind the tokens that
    may stay, and see the text up to theirs, that one, and the prompt tokens before them. The weights are a vector for
    each token that is guessed. From the paper: embeddings alone are trained, by distillation of what the model itself
    says in those places; and that one pass verifies and guesses. Ours: prompt tokens behind every token of a text at
    once in training; they begin as draws with the mean and spread of the vocabulary's embeddings. Not built: several
    embeddings for one place, whose guesses are averaged.

    Attributes:
        tokens: how many tokens are guessed.
    """

    drafter: ClassVar[str] = "ppd"

    tokens: Annotated[int, Field(ge=1, le=8)] = 3

    def build(self, shape: DecoderConfig) -> PromptTokens:
        return PromptTokens(shape, self.tokens)
