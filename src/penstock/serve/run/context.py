"""The attention context of a flat batch over the paged cache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.contract import PagedCache


@dataclasses.dataclass(frozen=True)
class PagedTokens:
    """Tokens [N] of several sequences, whose earlier keys and values are in ``cache``, for which a batch is planned.

    Attributes:
        positions: int64 [N].
    """

    keeps: ClassVar[bool] = True
    positions: Tensor
    cache: PagedCache

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
        return self.cache.attend(layer, query, key, value, scale=scale, window=window, extras=extras)
