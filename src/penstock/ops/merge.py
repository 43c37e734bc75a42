"""Exact merge of attention over parts of the keys: the step that lets one query's keys be split among workers."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(outputs: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each of them.

    A part's output is a weighted mean of values, and the exponential of its log-sum-exp is the sum of the weights; so
    the whole is the mean of the parts by these sums. The merge is associative: parts may be merged in any grouping and
    order. It is how stream-K decoding (Lean Attention [441]) puts heads together that were cut between workers.

    Args:
        outputs: [P, *T, H, D], the parts.
        logsumexp: [P, *T, H], the natural logarithm of the sum of exponentials of a part's scores. It is -inf where a
            part holds no key; what ``outputs`` has there is not looked at.

    Returns:
        The output [*T, H, D] in the dtype of ``outputs``, and its log-sum-exp [*T, H]. Where all parts are empty they
        are 0 and -inf.
    """
    whole = logsumexp.logsumexp(0)
    empty = logsumexp == -torch.inf
    weights = (logsumexp - whole).exp().masked_fill(empty, 0).unsqueeze(-1)
    parts = outputs.masked_fill(empty.unsqueeze(-1), 0)
    return (weights * parts).sum(0).to(outputs.dtype), whole
