"""Log-probabilities of tokens, and of the most probable ones beside them, as rows of integers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def _spread(scores: Tensor) -> Tensor:
    """Entropy and certainty [R, 2], given log-probabilities [R, vocabulary]."""
    # A token that cannot come adds nothing to the entropy, and its certainty is without bound.
    entropy = torch.special.entr(scores.exp()).sum(-1)
    certainty = -scores.mean(-1) - math.log(scores.shape[-1])
    return torch.stack([entropy, certainty], -1)
