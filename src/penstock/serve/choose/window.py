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


def accept_path(tokens: Tensor, first: Tensor, window: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`accept_prefix` is for chains, for trees: from the newest token on, always to the one behind it that
    was chosen there, if it is among the drafted ones.

    Args:
        parents: int64 [S, W], where in the window the token before each stands; -1 for the newest settled token.

    Returns:
        How many tokens S sequences settle, int64 [S]; and int64 [R], in which order their rows come once each
        sequence's settled tokens are in a row, from its first on. What is behind them is of no meaning.
    """
    node, going = torch.zeros_like(first), torch.ones_like(first, dtype=torch.bool)
    counts, order = torch.ones_like(first), torch.arange(len(tokens) + 1, device=first.device)
    for _ in range(window.shape[1]):
        follows = (window == tokens[first + node].unsqueeze(1)) & (parents == node.unsqueeze(1) - 1)
        going = going & follows.any(1)
        node = torch.where(going, follows.long().argmax(1) + 1, node)
        # Those that have ended write behind all rows.
        order[torch.where(going, first + counts, len(tokens))] = first + node
        counts = counts + going
    return counts, order[:-1]


def last_of(tokens: Tensor, first: Tensor, counts: Tensor) -> Tensor:
    """The last of the ``counts`` [S] tokens that each sequence settles, of the ``tokens`` [R] in rows from ``first``
    [S] on."""
    return tokens[first + counts - 1]
