"""Experts in groups: a token goes to experts of the best groups only."""

from __future__ import annotations

import math

from torch import Tensor

from penstock.ops.experts import top_few


def outside(scores: Tensor, groups: int, kept: int, counted: int) -> Tensor:
    """Which experts are in none of the ``kept`` best of ``groups`` equal groups: bool, as ``scores`` [N, experts].

    A group is as good as the sum of its ``counted`` best scores.
    """
    each = scores.view(len(scores), groups, -1)
    size = each.shape[-1]
    best, _ = top_few(each.flatten(0, 1), min(counted, size))
    _, chosen = top_few(best.sum(-1).view(-1, groups), kept)
    left = scores.new_full((len(scores), groups), math.inf).scatter(1, chosen, 0.0)
    return left.repeat_interleave(size, 1) > 0
