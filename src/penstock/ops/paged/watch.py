"""The newest queries of sequences, kept for those who ask what they look at."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.ops.paged.contract import CacheShape, PagedBatch


class Watch:
    """Keeps the last ``width`` queries of each sequence in all layers, in a ring of its own by its slot.

    A cache that has one tells it of each batch and each layer (:attr:`PagedCache.watch`). Memory is taken once: a
    captured graph writes to the same places each time.

    Args:
        shape: of the cache.
        slots: most sequences at a time.
        width: how many queries of each are kept.
        tokens: most tokens of a batch.

    Attributes:
        width: as given.
        scales: of each layer, what its attention multiplied scores with last.
    """

    def __init__(self, shape: CacheShape, slots: int, width: int, tokens: int) -> None:
        self.width = width
        self._device, self._tokens = shape.device, tokens
        # The first place of all takes what nobody wants.
        places = 1 + slots * width
        self._queries = torch.zeros(
            shape.layers, places, shape.heads, shape.head_dim, dtype=shape.dtype, device=shape.device
        )
        self._lanes: dict[int, Tensor] = {}
        self.scales = [0.0] * shape.layers

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self._queries.nbytes

    def plan(self, batch: PagedBatch, lane: int) -> None:
        """What is noted next belongs to ``batch``."""
        if lane not in self._lanes:
            self._lanes[lane] = torch.zeros(self._tokens, dtype=torch.int64, device=self._device)
        self._places = self._lanes[lane][: len(batch.slots)]
        if batch.watched is None:
            self._places.zero_()
        else:
            self._places.copy_(upload(batch.watched.numpy(), self._device))

    def note(self, layer: int, query: Tensor, scale: float) -> None:
        """``query`` [N, H, D] of the planned batch, in ``layer``."""
        self._queries[layer].index_copy_(0, self._places, query)
        self.scales[layer] = scale

    def read(self, slot: int, end: int, count: int) -> Tensor:
        """The queries [layers, n, H, D] of the sequence in ``slot`` at its last n positions before ``end``, in order;
        n is ``count``, at most the width, or ``end`` where that is less."""
        positions = torch.arange(max(0, end - count), end, device=self._device)
        return self._queries[:, 1 + slot * self.width + positions % self.width]


def watched_places(slots: np.ndarray, positions: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
    """Where the queries of tokens are kept, int64 [N]: of the token at ``positions[i]`` of the sequence in slot
    ``slots[i]``, which a batch computes up to ``ends[i]``. Only the last ``width`` of a sequence are."""
    return np.where(positions >= ends - width, 1 + slots * width + positions % width, 0)
