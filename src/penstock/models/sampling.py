"""Choosing the next token."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from penstock.core.config import Config

#: Of a vocabulary more than twice as large, so many tokens are looked at first where a share of probability is cut.
SHORTLIST = 1024


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
    """The distribution [*, vocabulary] that ``sampling`` draws from, given ``logits`` of that shape."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    rows = logits.shape[:-1]

    def option(value: float) -> Tensor:
        return torch.full(rows, value, dtype=torch.float64, device=logits.device)

    return probabilities_of(
        logits,
        temperature=option(sampling.temperature),
        top_k=option(sampling.top_k).long() if sampling.top_k is not None else None,
        top_p=option(sampling.top_p) if sampling.top_p < 1 else None,
        min_p=option(sampling.min_p) if sampling.min_p > 0 else None,
    )


def probabilities_of(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    widest: int | None = None,
) -> Tensor:
    """The distributions [*R, vocabulary] of rows that have options of their own, each of shape [*R]; no temperature
    is 0.

    Probabilities are renormalised after each cut, so that a later cut sees those of the tokens still left. ``top_k`` 0
    leaves all tokens; an option that is None is not asked for by any row. ``widest`` is the largest of ``top_k``, all
    above 0, where it is known without asking the device.
    """
    size = logits.shape[-1]
    scores = logits
    if top_k is not None:
        limit = torch.where(top_k > 0, top_k, size).clamp(max=size)
        ranked = scores.topk(int(limit.max()) if widest is None else min(widest, size), -1).values
        scores = scores.masked_fill(scores < ranked.gather(-1, (limit - 1).unsqueeze(-1)), -torch.inf)
    # Counted from the largest, scores stay numbers however small the temperature is.
    heat = temperature.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).tiny).unsqueeze(-1)
    chances = ((scores - scores.amax(-1, keepdim=True)) / heat).softmax(-1)
    if top_p is not None:
        order = _ranked(scores, chances, top_p)
        before = F.pad(chances.gather(-1, order).double().cumsum(-1)[..., :-1], (1, 0))
        # A token stays if those before it do not reach p yet, so that the first always stays.
        kept = (before < top_p.unsqueeze(-1)) | (top_p.unsqueeze(-1) >= 1)
        chances = chances * torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, kept)
        chances = chances / chances.sum(-1, keepdim=True)
    if min_p is not None:
        chances = chances * (chances >= min_p.to(chances.dtype).unsqueeze(-1) * chances.amax(-1, keepdim=True))
        chances = chances / chances.sum(-1, keepdim=True)
    return chances


def _ranked(scores: Tensor, chances: Tensor, top_p: Tensor) -> Tensor:
    """Tokens [*R, K] from the largest score down, of equals the first before the others; all that are not among them
    come after ``top_p`` is reached. By score, since rounding can make the probabilities of unlike scores equal."""
    # Of a large vocabulary, a small part nearly always reaches it; whether it does can be asked on the CPU for nothing.
    if scores.device.type == "cpu" and scores.shape[-1] > 2 * SHORTLIST:
        best = scores.topk(SHORTLIST, -1).indices.sort(-1).values
        own, own_chances = scores.gather(-1, best), chances.gather(-1, best).double()
        # Tokens that tie with the last may have been left out.
        reached = (own_chances * (own > own.amin(-1, keepdim=True))).sum(-1)
        if bool((reached >= top_p).all()):
            return best.gather(-1, own.sort(dim=-1, descending=True, stable=True).indices)
    return scores.sort(dim=-1, descending=True, stable=True).indices


def draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """The token int64 [*R] that a number in [0, 1) picks from each of ``chances`` [*R, vocabulary]: the first at which
    the cumulated probability exceeds ``uniform`` [*R] (float64) times the sum."""
    reached = chances.cumsum(-1)
    total = reached[..., -1:]
    aim = (uniform.unsqueeze(-1) * total.double()).to(chances.dtype)
    # Rounding may lift the aim to the sum itself, which nothing exceeds.
    aim = torch.minimum(aim, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, aim, right=True).squeeze(-1)
