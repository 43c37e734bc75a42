"""Texts with pseudo tokens behind each of their tokens, all in one row."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from penstock.ops.attention import PLAIN, Extras, attend_rows, causal_mask


@dataclasses.dataclass(frozen=True)
class PseudoRows:
    """Rows [B, S] of a text's T tokens and, behind them, of pseudo tokens: the first one behind each of the T, then the
    second one, and so on. A pseudo token sees the text up to the token that it stands behind, and those before it that
    stand behind the same.

    Attributes:
        positions: int64 [B, S].
        seen: bool [B, S, S], which tokens each one sees, windows and chunks aside.
    """

    keeps: ClassVar[bool] = False
    positions: Tensor
    seen: Tensor

    @classmethod
    def of(cls, positions: Tensor, pseudo: int, context: int) -> PseudoRows:
        """The rows of texts whose tokens have these ``positions`` [B, T], with so many ``pseudo`` tokens behind each.
        Those that would have a position behind the ``context`` have its last one: nothing is guessed for them."""
        length, device = positions.shape[-1], positions.device
        owner = torch.arange(length, device=device).repeat(1 + pseudo)
        rank = torch.arange(1 + pseudo, device=device).repeat_interleave(length)
        documents = (positions == 0).cumsum(-1)[..., owner]
        text = (rank == 0) & (owner <= owner.unsqueeze(1))
        before = (owner == owner.unsqueeze(1)) & (rank <= rank.unsqueeze(1))
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        return cls((positions[..., owner] + rank).clamp(max=context - 1), same & (text | before))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        mask = self.seen & causal_mask(self.positions, self.positions, window, extras.chunk)
        return attend_rows(query, key, value, scale=scale, mask=mask.unsqueeze(1), extras=extras)
