"""Choosing the next token."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from penstock.core.config import Config


class Sampling(Config):
    """How tokens are chosen. ``temperature`` 0 is greedy; the cuts apply in the order of the fields.

    Attributes:
        temperature: divides the logits.
        top_k: keep the k most probable tokens, and those that tie with the last of them (None: all).
        top_p: keep the most probable tokens whose probabilities reach p together.
        min_p: keep tokens of at least this share of the most probable one's probability.
        max_tokens: how many tokens at most.
        seed: of the draws.
    """

    temperature: NonNegativeFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_tokens: PositiveInt = 256
    seed: int = 0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [*, vocabulary] that ``sampling`` draws from, given ``logits`` of that shape.

    Probabilities are renormalised after each cut, so that a later cut sees those of the tokens still left. By sorting,
    as it is defined; ``ops/cuts.py`` finds the same tokens without.
    """
    size = logits.shape[-1]
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), size).to(logits.dtype)
    scores = logits
    if sampling.top_k is not None and sampling.top_k < size:
        last = scores.topk(sampling.top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    # Counted from the largest, scores stay numbers however small the temperature is.
    heat = max(sampling.temperature, torch.finfo(scores.dtype).tiny)
    chances = ((scores - scores.amax(-1, keepdim=True)) / heat).softmax(-1)
    if sampling.top_p < 1:
        # By score, since rounding can make the probabilities of unlike scores equal; of equals, the first.
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        before = F.pad(chances.gather(-1, order).double().cumsum(-1)[..., :-1], (1, 0))
        # A token stays if those before it do not reach p yet, so that the first always stays.
        chances = chances * torch.zeros_like(chances).scatter(-1, order, (before < sampling.top_p).to(chances.dtype))
        chances = chances / chances.sum(-1, keepdim=True)
    if sampling.min_p > 0:
        chances = chances * (chances >= sampling.min_p * chances.amax(-1, keepdim=True))
        chances = chances / chances.sum(-1, keepdim=True)
    return chances


def draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """The token int64 [*R] that a number in [0, 1) picks from each of ``chances`` [*R, vocabulary]: the first at which
    the cumulated probability exceeds ``uniform`` [*R] (float64) times the sum."""
    reached = chances.cumsum(-1)
    total = reached[..., -1:]
    aim = (uniform.unsqueeze(-1) * total.double()).to(chances.dtype)
    # Rounding may lift the aim to the sum itself, which nothing exceeds.
    aim = torch.minimum(aim, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, aim, right=True).squeeze(-1)
