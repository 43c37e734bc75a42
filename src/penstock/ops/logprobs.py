"""Log-probabilities of tokens, and of the most probable ones beside them, as rows of integers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.ops.pieces import pieces


def logprob_table(logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None = None) -> Tensor:
    """The log-probabilities of ``tokens`` int64 [R] under softmax(``logits`` [R, V]), in one array, so that one copy
    brings them to the host: int32 [R, 5 + 2k], with k of ``most`` and V the smaller one.

    A row holds the token, its rank, which is 1 where no other is more probable, and as bits of fp32 its log-probability
    and the distribution's entropy and distance from the even one, KL(even || model), in nats; behind them the k most
    probable tokens, each a token and the bits of its log-probability. Entropy and distance are 0 but in the rows that
    ``spread`` bool [R] names. On CUDA the logits are read once, and a row does not depend on the others.
    """
    most = min(most, logits.shape[-1])
    if logits.is_cuda:
        from penstock.ops.logprobs_kernel import logprob_rows

        return logprob_rows(logits.contiguous(), tokens, most, spread)
    if spread is None:
        return torch.cat([_table(own, chosen, most, None) for own, chosen in pieces(logits, tokens)])
    return torch.cat([_table(own, chosen, most, asked) for own, chosen, asked in pieces(logits, tokens, spread)])


def _table(logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None) -> Tensor:
    """:func:`logprob_table` of a few rows."""
    scores, which = logits.float(), tokens.unsqueeze(-1)
    # Counted from the largest score, of which softmax loses nothing: its logarithm gives those of all the others, and
    # no second exponential is taken.
    gaps = scores - scores.amax(-1, keepdim=True)
    chances = gaps.softmax(-1)
    best = chances.amax(-1, keepdim=True).log()
    chosen = gaps.gather(-1, which) + best
    # A comparison that is written as numbers is much faster than one written as booleans.
    above = torch.gt(scores, scores.gather(-1, which), out=torch.empty_like(scores))
    rank = above.sum(-1, keepdim=True).int() + 1
    top = gaps.topk(most, -1)
    pairs = torch.stack([top.indices.int(), (top.values + best).view(torch.int32)], -1).flatten(1)
    shape = chosen.new_zeros(len(scores), 2)
    if spread is not None:
        shape = torch.where(spread.unsqueeze(-1), _spread(gaps, chances, best), shape)
    values = torch.cat([chosen, shape], -1).view(torch.int32)
    return torch.cat([which.int(), rank, values, pairs], -1)


def _spread(gaps: Tensor, chances: Tensor, best: Tensor) -> Tensor:
    """Entropy and certainty [R, 2] of ``chances`` [R, V], given how far below the largest score all are, ``gaps``
    [R, V], and the logarithm of the largest chance, ``best`` [R, 1]."""
    # A token that cannot come adds nothing to the entropy, and its certainty is without bound.
    entropy = -best.squeeze(-1) - (chances * gaps.clamp(min=torch.finfo(gaps.dtype).min)).sum(-1)
    certainty = -best.squeeze(-1) - gaps.mean(-1) - math.log(gaps.shape[-1])
    return torch.stack([entropy, certainty], -1)
