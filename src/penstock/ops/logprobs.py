"""Log-probabilities of tokens, and of the most probable ones beside them, as rows of integers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: Columns before the alternatives: the token, its rank, its log-probability, and entropy and certainty of the position.
FIXED = 5


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
        wanted = torch.full_like(tokens, 2 * (most + 1))
        return wanted_table(logits, tokens, wanted if spread is None else wanted + spread, most)
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(-1, tokens.unsqueeze(-1))
    rank = (scores > chosen).sum(-1, keepdim=True) + 1
    top = scores.topk(most, -1)
    pairs = torch.stack([top.indices.int(), top.values.view(torch.int32)], -1).flatten(1)
    shape = (
        chosen.new_zeros(len(scores), 2) if spread is None else torch.where(spread.unsqueeze(-1), _spread(scores), 0.0)
    )
    values = torch.cat([chosen, shape], -1).view(torch.int32)
    return torch.cat([tokens.unsqueeze(-1).int(), rank.int(), values, pairs], -1)


def wanted_by(alternatives: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """What rows want to be told, int64 [R], as one number each: nothing (0) where ``alternatives`` int64 [R] is -1,
    else twice one more than these, and 1 more with how the row is ``spread`` bool [R]."""
    wanted: np.ndarray = np.where(alternatives < 0, 0, 2 * (alternatives + 1) + spread)
    return wanted


def wanted_table(logits: Tensor, tokens: Tensor, wanted: Tensor, most: int) -> Tensor:
    """What :func:`logprob_table` tells with ``most`` alternatives, in the rows and as far as :func:`it is wanted
    <wanted_by>`, int64 [R]; the rest of the array is of no meaning. Nothing waits for the device, so that it can be a
    part of a graph, whatever the rows want."""
    if logits.is_cuda:
        from penstock.ops.logprobs_kernel import logprob_rows

        return logprob_rows(logits.contiguous(), tokens, wanted, min(most, logits.shape[-1]), FIXED)
    table, columns = logprob_table(logits, tokens, most, wanted % 2 == 1), wanted // 2 * 2 + FIXED - 2
    there = torch.arange(table.shape[1]) < torch.where(wanted > 0, columns, 0).unsqueeze(-1)
    return torch.where(there, table, 0)


def _spread(scores: Tensor) -> Tensor:
    """Entropy and certainty [R, 2], given log-probabilities [R, vocabulary]."""
    # A token that cannot come adds nothing to the entropy, and its certainty is without bound.
    entropy = torch.special.entr(scores.exp()).sum(-1)
    certainty = -scores.mean(-1) - math.log(scores.shape[-1])
    return torch.stack([entropy, certainty], -1)
