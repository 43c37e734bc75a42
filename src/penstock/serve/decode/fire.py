"""A flaming-hot first token."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.serve.decode.contract import DecodeRule, Limit, S


@policy("decode.rule", "fire", papers=[186])
class Fire(DecodeRule):
    """Draws the first token at a high temperature among the most probable ones, and the rest as always (FIRE).

    With many samples of one prompt, starts differ more, and so does what follows from them.

    From the paper: the hot first token, regular decoding after it, the cut to the top k that keeps the start sensible.
    Ours: the default numbers, and that the cuts of the request (top-p, min-p) do not apply to the hot token, whose
    nearly flat distribution they were not meant for.

    Attributes:
        temperature: of the first token.
        top_k: how many tokens it is drawn from; None takes the request's own cuts.
    """

    temperature: Annotated[float, Field(gt=0, le=100)] = 30.0
    top_k: Annotated[int, Field(ge=1, lt=1 << 31)] | None = 16

    @classmethod
    def limit(cls) -> Limit:
        return Limit(cls(temperature=0.8, top_k=None), {"temperature": 0.8, "top_p": 0.9})

    def options(self, sampling: S, count: int) -> S:
        if count:
            return sampling
        cuts = {"top_k": self.top_k, "top_p": 1.0, "min_p": 0.0} if self.top_k is not None else {}
        return sampling.model_copy(update={"temperature": self.temperature, **cuts})
