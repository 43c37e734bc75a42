"""Rows of scores a few at a time, as a CPU wants them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Scores that are looked at together: what is worked out for as many stays in the processor's cache, and in memory that
#: the process has. Larger pieces may be given back to the system and asked for again in each step, which takes longer
#: than to work them out.
PIECE = 2**18


def pieces(scores: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The ``scores`` [R, V] and what ``others`` [R, ...] have beside them, by as many rows as make a piece."""
    rows = max(1, PIECE // scores.shape[-1])
    return zip(*(torch.split(each, rows) for each in (scores, *others)), strict=True)
