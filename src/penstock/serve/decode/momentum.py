"""Greedy decoding that leaves its loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from penstock.models.sampling import Sampling
from penstock.policy import policy
from penstock.serve.decode.contract import DecodeRule, Limit


@policy("decode.rule", "momentum", papers=[58])
class Momentum(DecodeRule):
    """Takes the most probable token if it is new to the text; one that was there is charged for the path that it
    retraces, so that the text gets out of circles without looking ahead (momentum decoding).

    Tokens are the nodes of a graph, the text is a walk in it. Among the ``candidates`` most probable tokens, the one
    with the largest p(token) - alpha * resistance(depth) is taken, where depth is the length of the longest piece of
    text, ending in the token, that was there before: 0 for a new token, 1 for one that was never reached from the last
    tokens, and so on.

    From the paper and its code: the graph over prompt and continuation, candidates, the difference, a resistance that
    grows with a depth looked at up to five tokens, alpha 0.2. Ours: how many candidates there are by default,
    and that a depth beyond the table costs its last entry.

    Attributes:
        alpha: weight of the resistance; 0 is greedy decoding.
        resistance: of depth 0, 1, 2, ...; it never falls.
        candidates: how many tokens are looked at.
    """

    alpha: Annotated[float, Field(ge=0, le=100)] = 0.2
    resistance: Annotated[tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(min_length=1, max_length=33)] = (
        0.0,
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
    )
    candidates: Annotated[int, Field(ge=1, le=1024)] = 5

    @model_validator(mode="after")
    def _grows(self) -> Momentum:
        if list(self.resistance) != sorted(self.resistance):
            raise ValueError("the resistance must not fall with the depth")
        return self

    @classmethod
    def limit(cls) -> Limit:
        return Limit(cls(alpha=0.0), {"temperature": 0.0})

    def refuses(self, sampling: Sampling) -> str | None:
        if sampling.temperature > 0:
            return "momentum decoding takes the best token and draws none: set temperature to 0"
        return None

    def read(self, texts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        found = [depths(text, len(self.resistance) - 1) for text in texts]
        depth = np.concatenate([each for _, each in found])
        return {
            "rows": np.repeat(np.arange(len(found)), [len(tokens) for tokens, _ in found]),
            "tokens": np.concatenate([tokens for tokens, _ in found]),
            "costs": (self.alpha * np.array(self.resistance)[depth]).astype(np.float32),
        }

    def rescore(self, scores: Tensor, **known: Tensor) -> Tensor:
        gain = scores.softmax(-1)
        gain[known["rows"], known["tokens"]] -= known["costs"]
        least = scores.topk(min(self.candidates, scores.shape[-1]), -1).values[:, -1:]
        gain = gain.masked_fill((scores < least) | (scores == -torch.inf), -torch.inf)
        # Of tokens that gain the same, the one with the larger score is left to be taken.
        return scores.masked_fill(gain < gain.amax(-1, keepdim=True), -torch.inf)


def depths(tokens: Sequence[int], most: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token of ``tokens``, once: how long a piece of text would be there a second time if it came next, at
    most ``most``. int64 tokens and depths."""
    text = np.asarray(tokens, np.int64)
    length = np.ones(len(text), np.int64)
    alive = np.ones(len(text), bool)
    for back in range(1, min(most, len(text))):
        # The token at i is alive while the ``back`` tokens before it are the last ones of the text.
        alive[:back] = False
        alive[back:] &= text[:-back] == text[-back]
        length += alive
    known, inverse = np.unique(text, return_inverse=True)
    depth = np.zeros(len(known), np.int64)
    np.maximum.at(depth, inverse, np.minimum(length, most))
    return known, depth
