"""Contrast with what a poorer prompt would say, where the model is unsure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.policy import policy
from penstock.serve.decode.contract import DecodeRule, Limit, Token


@policy("decode.rule", "uscd", papers=[174])
class UncertaintyAwareContrast(DecodeRule):
    """Where the model is unsure of the next token, takes away what it would say after a poorer prompt (USCD).

    That prompt may be the same task without its examples: what the model says after both is noise. The model is sure
    where its distribution is peaked. Elsewhere a token's chance becomes p - ``weight`` * p', with p' from the poorer
    prompt; tokens less probable than ``floor`` times the average are left out, and so are those whose chance is not
    positive. Where none is left, the distribution stays as it is.

    From the paper and its code: the "lame" prompt, the gate by the standard deviation of the distribution, the
    difference of distributions with 1 and -0.7 as weights, the floor relative to the mean. Ours: the deviation is
    counted as a share of the largest that a distribution over the vocabulary can have, so that the ``threshold`` does
    not depend on the vocabulary, and its default; the default floor; what happens where nothing is left.

    Attributes:
        prompt: the poorer prompt, as text or tokens. It takes memory and time like a second request.
        weight: of what is taken away.
        threshold: the gate opens below this deviation: 0 never opens it, 1 always does.
        floor: tokens below so many times the average probability are left out where the gate is open.
    """

    prompt: Annotated[str, Field(min_length=1)] | Annotated[tuple[Token, ...], Field(min_length=1)] = Field(
        examples=[(3, 1, 2)]
    )
    weight: Annotated[float, Field(ge=0, lt=100)] = 0.7
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    floor: Annotated[float, Field(ge=0)] = 1.0

    @classmethod
    def limit(cls) -> Limit:
        return Limit(cls(prompt=(3, 1, 2), threshold=0), {"temperature": 0.7, "top_k": 9})

    @property
    def companions(self) -> tuple[tuple[int, ...], ...]:
        if isinstance(self.prompt, str):
            raise UsageError("the rule's prompt is text, and an engine knows tokens: use sampling.tokenized(encode)")
        return (self.prompt,)

    @property
    def arithmetic(self) -> Self:
        return self.model_copy(update={"prompt": (0,)})

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        if not isinstance(self.prompt, str):
            return self
        tokens = tuple(encode(self.prompt))
        if not tokens:
            raise UsageError("the rule's prompt has no tokens")
        return self.model_copy(update={"prompt": tokens})

    def combine(self, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        own, other = scores.softmax(-1).unbind(1)
        # One token with probability 1 has a deviation of size^-1/2, and nothing has more.
        unsure = own.std(-1, keepdim=True) * size**0.5 < self.threshold
        left = own - self.weight * other
        kept = (left > 0) & (own >= self.floor / size)
        contrasted = left.log().masked_fill(~kept, -torch.inf)
        return torch.where(unsure & kept.any(-1, keepdim=True), contrasted, scores[:, 0])
