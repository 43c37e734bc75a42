"""The hidden states of tokens in the cache, for heads that draft from them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

from penstock.core import pages
from penstock.core.devices import upload
from penstock.ops.paged.contract import CacheShape, PagedBatch


class HiddenStates:
    """What the model's last layer gave for each token whose keys and values are in the cache, in the same places: so
    what is shared, forked, cut back or evicted there is so here.

    Args:
        shape: of the cache.
        width: of a hidden state.
    """

    def __init__(self, shape: CacheShape, width: int) -> None:
        self._size, self._device = shape.block_size, shape.device
        self._states = pages.zeros((shape.blocks, self._size, width), shape.dtype, shape.device)

    def write(self, places: Tensor, states: Tensor) -> None:
        """Tokens in ``places`` (int64 [N], slots of the cache) have these ``states`` [N, width]."""
        self._states.flatten(0, 1).index_copy_(0, places, states)

    def read(self, tables: np.ndarray, tokens: Iterable[tuple[int, int]]) -> Tensor:
        """Those of some ``tokens``, (row of ``tables``, number in the sequence) each: [N, width]."""
        rows, numbers = np.array(list(tokens), np.int64).reshape(-1, 2).T
        return self._states.flatten(0, 1)[self._places(tables, rows, numbers)]

    def before(self, plan: PagedBatch, positions: np.ndarray) -> Tensor:
        """Those after the token before each of the tokens at ``positions`` int64 [N] of ``plan``, [N, width]; zeros
        for the first token of a sequence."""
        rows = np.repeat(np.arange(len(plan.lengths)), np.diff(plan.starts.numpy()))
        states = self._states.flatten(0, 1)[self._places(plan.tables.numpy(), rows, np.maximum(positions - 1, 0))]
        return states * upload(positions > 0, self._device).unsqueeze(-1)

    def _places(self, tables: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> Tensor:
        """Slots of the cache of tokens, by the rows of their tables and their numbers in the sequences."""
        blocks = tables[rows, numbers // self._size].astype(np.int64)
        return upload(blocks * self._size + numbers % self._size, self._device)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Those of tokens in the places ``sources`` (int64 [N], slots of the cache) get to ``targets``; all are read
        before any is written."""
        self.write(targets, self._states.flatten(0, 1)[sources])

    def copy(self, sources: List[int], targets: List[int]) -> None:
        """Blocks are copied, all read before any is written."""
        to, of = (torch.tensor(each, device=self._device) for each in (targets, sources))
        self._states.index_copy_(0, to, self._states[of])
