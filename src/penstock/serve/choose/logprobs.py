"""Log-probabilities of tokens, as they are told to those who ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, whose rank is 1 where it is the most probable one, and of
    the most probable tokens in order (token, logprob)."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities under the model itself, for R tokens at their positions.

    Attributes:
        tokens: int64 [R].
        chosen: float32 [R], of the tokens.
        rank: int64 [R], 1 for the most probable token.
        values, names: float32 and int64 [R, k], the most probable tokens at each position.
    """

    tokens: Tensor
    chosen: Tensor
    rank: Tensor
    values: Tensor
    names: Tensor

    @staticmethod
    def of(logits: Tensor, tokens: Tensor, most: int) -> Logprobs:
        """Those of ``tokens`` [R], given ``logits`` [R, vocabulary], with ``most`` alternatives."""
        scores = logits.float().log_softmax(-1)
        chosen = scores.gather(-1, tokens.unsqueeze(-1))
        top = scores.topk(min(most, scores.shape[-1]), -1)
        return Logprobs(tokens, chosen.squeeze(-1), (scores > chosen).sum(-1) + 1, top.values, top.indices)

    @staticmethod
    def joined(parts: Sequence[Logprobs]) -> Logprobs:
        """Those of all ``parts``, which have equally many alternatives, one behind the other."""
        return Logprobs(*map(torch.cat, zip(*(part._parts() for part in parts), strict=True)))

    def to_host(self) -> Logprobs:
        """The same on the host, once what is queued on the device now is done."""
        return Logprobs(*(each.to("cpu", non_blocking=True) for each in self._parts()))

    def records(self, alternatives: Sequence[int]) -> list[TokenLogprobs]:
        """What is told of each token, with so many ``alternatives`` [R]."""
        parts = (each.tolist() for each in self._parts())
        return [
            TokenLogprobs(token, logprob, rank, list(zip(names[:most], values[:most], strict=True)))
            for token, logprob, rank, values, names, most in zip(*parts, alternatives, strict=True)
        ]

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.chosen, self.rank, self.values, self.names
