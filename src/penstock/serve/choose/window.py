"""Settling tentative tokens, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def accept_prefix(tokens: Tensor, first: Tensor, window: Tensor) -> Tensor:
    """How many tokens S sequences settle, int64 [S]: drafted ones as long as they are what was chosen in their place,
    and the one that was chosen behind them.

    Args:
        tokens: int64 [R], what each row chose.
        first: int64 [S], the row of each sequence's newest settled token; the rows of its tentative ones follow.
        window: int64 [S, W], the tentative tokens; -1 behind the last one of a sequence.
    """
    rows = first.unsqueeze(1) + torch.arange(window.shape[1], device=first.device)
    chosen = tokens[rows.clamp(max=len(tokens) - 1)]
    return 1 + (chosen == window).long().cumprod(1).sum(1)


def last_of(tokens: Tensor, first: Tensor, counts: Tensor) -> Tensor:
    """The last of the ``counts`` [S] tokens that each sequence settles, of the ``tokens`` [R] in rows from ``first``
    [S] on."""
    return tokens[first + counts - 1]
