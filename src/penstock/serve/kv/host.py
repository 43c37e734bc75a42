"""Blocks of the cache in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from penstock.ops.paged.contract import PagedCache


class HostBlocks:
    """Places for blocks of ``cache``, which keys and values are copied to and from, bit for bit.

    On CUDA the places are in pinned memory, and what goes over the bus does so on a stream of its own, beside the work:
    what is saved was computed by the work that is queued, and what is loaded is there for the work that is queued next.
    Elsewhere everything is done at once.

    Args:
        cache: the memory that blocks leave and come back to.
        places: how many blocks fit.
    """

    def __init__(self, cache: PagedCache, places: int) -> None:
        shape = cache.shape
        self._cache, self._device = cache, shape.device
        numbers, dtype = shape.codec.stored(shape.head_dim, shape.dtype)
        form = (shape.parts, shape.layers, shape.kv_heads, shape.block_size, numbers)
        self.places, self.place_bytes = places, shape.block_bytes
        on_cuda = shape.device.type == "cuda"
        self._memory = torch.empty((places, *form), dtype=dtype, pin_memory=on_cuda)
        self._bytes = self._memory.view(places, -1).view(torch.uint8).numpy()
        self._stream = torch.cuda.Stream(shape.device) if on_cuda else None  # type: ignore[no-untyped-call]

    def save(self, blocks: List[int], places: List[int]) -> None:
        """Copies the ``blocks`` of the cache to ``places``, none of which comes twice."""
        parts = [_by_block(each, len(blocks)) for each in self._cache.codes(self._slots(blocks))]
        staged = torch.stack(parts, 1)
        if self._stream is None:
            self._memory[list(places)] = staged
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, block in zip(places, staged, strict=True):
                self._memory[place].copy_(block, non_blocking=True)
        staged.record_stream(self._stream)

    def load(self, places: List[int], blocks: List[int]) -> None:
        """Copies ``places`` to the ``blocks`` of the cache, none of which comes twice."""
        if self._stream is None:
            staged = self._memory[list(places)]
        else:
            main = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._stream):
                staged = torch.empty(
                    (len(places), *self._memory.shape[1:]), dtype=self._memory.dtype, device=self._device
                )
                for row, place in zip(staged, places, strict=True):
                    row.copy_(self._memory[place], non_blocking=True)
            main.wait_stream(self._stream)
            staged.record_stream(main)
        self._cache.put(self._slots(blocks), [_by_token(part) for part in staged.unbind(1)])

    def content(self, place: int) -> memoryview:
        """The bytes of ``place``, once all copies that were queued are done. Any thread may ask."""
        if self._stream is not None:
            self._stream.synchronize()
        return memoryview(self._bytes[place]).cast("B")

    def _slots(self, blocks: List[int]) -> Tensor:
        size = self._cache.shape.block_size
        return (torch.tensor(blocks)[:, None] * size + torch.arange(size)).flatten()


def _by_block(tokens: Tensor, count: int) -> Tensor:
    """[layers, K, count * size, n] as [count, layers, K, size, n]."""
    layers, heads, _, numbers = tokens.shape
    return tokens.reshape(layers, heads, count, -1, numbers).movedim(2, 0)


def _by_token(blocks: Tensor) -> Tensor:
    """What :func:`_by_block` made, as it was."""
    return blocks.movedim(0, 2).flatten(2, 3)
