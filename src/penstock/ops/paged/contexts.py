"""Attention to contexts beside a text: tokens that were encoded apart from it, and from each other.

A token of the text sees its own text as ever, and all tokens of the contexts. Their scores are divided by a
temperature, and the logarithm of the sum of their exponentials is multiplied by a scale, before the two are joined:
with o, c the scores of the text and of the contexts, S the scale and T the temperature, the weights are those of

    softmax([o, c / T + (S - 1) logsumexp(c / T)]).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Scores that are in memory at a time.
SCORES = 1 << 24


class Contexts(NamedTuple):
    """What a sequence of a batch sees beside its own tokens.

    Attributes:
        sequence: its number in the batch.
        after: the first place of the sequence whose token sees them.
        slots: int64 [c], where their keys and values are; none is among the sequence's own.
        temperature: of their scores.
        scale: of their log-sum-exp.
    """

    sequence: int
    after: int
    slots: Tensor
    temperature: float
    scale: float


def attend_beside(
    query: Tensor, key: Tensor, value: Tensor, contexts: Contexts, *, scale: float, first: int, own: int
) -> Tensor:
    """Attention [t, H, D] of the tokens at the places ``first``, ``first`` + 1, ... of a sequence with the ``query``
    [t, H, D]. ``key`` and ``value`` [n, K, D] are those of its ``own`` first tokens, and of the contexts behind them;
    ``scale`` is the factor on all scores. Sums are in float32, or in float64 for such."""
    rows = max(1, SCORES // (query.shape[1] * len(key)))
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (each.to(wide).transpose(0, 1) for each in (key, value))
    places = torch.arange(first, first + len(query), device=query.device)
    pieces = zip(torch.split(query, rows), torch.split(places, rows), strict=True)
    return torch.cat([_attend(part.to(wide), keys, values, contexts, scale, at, own) for part, at in pieces]).to(
        query.dtype
    )


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, contexts: Contexts, scale: float, places: Tensor, own: int
) -> Tensor:
    count, heads, dim = query.shape
    grouped = query.view(count, len(keys), heads // len(keys), dim)
    scores = torch.einsum("tkgd,knd->tkgn", grouped, keys) * scale
    later = torch.arange(own, device=query.device) > places[:, None]
    text, beside = scores[..., :own].masked_fill(later[:, None, None], -math.inf), scores[..., own:]
    beside = beside / contexts.temperature
    sums = torch.stack([text.logsumexp(-1), contexts.scale * beside.logsumexp(-1)])
    shares = sums.softmax(0).unsqueeze(-1)
    of_text = torch.einsum("tkgn,knd->tkgd", text.softmax(-1), values[:, :own])
    of_contexts = torch.einsum("tkgn,knd->tkgd", beside.softmax(-1), values[:, own:])
    return (shares[0] * of_text + shares[1] * of_contexts).flatten(1, 2)
