"""What the backends for CUDA devices have in common: how keys and values lie in memory."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from penstock.core import pages
from penstock.core.devices import upload
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.contract import ALL_LAYERS, CacheShape, PagedCache

_caches: weakref.WeakValueDictionary[int, CudaCache] = weakref.WeakValueDictionary()
_handles = itertools.count()


@custom_op("penstock::attend_paged", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: int,
    layer: int,
    scale: float,
    window: int | None,
    cap: float | None,
    sinks: Tensor | None,
    chunk: int | None,
) -> Tensor:
    # One opaque operator to torch.compile: what it does to the cache is nobody else's business.
    _caches[cache].note(layer, query, scale)
    return _caches[cache].compute(query, key, value, layer, scale, window, Extras(cap, sinks, chunk))


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


class CudaCache(PagedCache):
    """Keys and values as [layers, blocks, 2, block_size, K, n], or keys alone, [layers, blocks, 1, block_size, K, n],
    where they are latent; n numbers are what the codec stores for a vector.

    Attributes:
        memory: the tensor.
    """

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        # It stays when the memory changes its size: compiled code knows it.
        self._handle = next(_handles)
        _caches[self._handle] = self

    def allocate(self) -> None:
        shape = self.shape
        numbers, dtype = shape.codec.stored(shape.head_dim, shape.dtype)
        # What there was goes first, and not into the allocator's keeping: both may not fit.
        self.memory = torch.empty(0)
        torch.cuda.empty_cache()
        sizes = shape.layers, shape.blocks, shape.parts, shape.block_size, shape.kv_heads, numbers
        self.memory = pages.zeros(sizes, dtype, shape.device)

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
        out: Tensor = _attend(query, key, value, self._handle, layer, scale, window, *extras)
        return out

    def compute(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None, extras: Extras
    ) -> Tensor:
        """:meth:`attend`, as the operator calls it."""
        raise NotImplementedError

    def copy(self, sources: list[int], targets: list[int]) -> None:
        source, target = (upload(np.array(blocks, np.int64), self.shape.device) for blocks in (sources, targets))
        self.memory[:, target] = self.memory[:, source]

    def codes(self, slots: Tensor, layers: slice = ALL_LAYERS) -> list[Tensor]:
        block, place = self._places(slots)
        return list(self.memory[layers][:, block, :, place].permute(2, 1, 3, 0, 4))

    def put(self, slots: Tensor, codes: Sequence[Tensor]) -> None:
        block, place = self._places(slots)
        self.memory[:, block, :, place] = torch.stack(list(codes)).permute(3, 1, 0, 2, 4)

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        slots = slots if slots.is_cuda else upload(slots.numpy(), self.shape.device)
        return slots // self.shape.block_size, slots % self.shape.block_size


def store(key: Tensor, value: Tensor, memory: Tensor, slots: Tensor) -> None:
    """Writes ``key`` and ``value`` [N, K, D] to the ``slots`` int64 [N] of ``memory`` [blocks, 2, block_size, K, D]."""
    from penstock.ops.paged.store_kernel import store_kernel

    # Views, where the heads of a token lie side by side.
    key, value = key.flatten(1), value.flatten(1)
    width = key.shape[1]
    store_kernel[(key.shape[0],)](
        key, value, memory, slots, key.stride(0), value.stride(0), memory.shape[2], width, 1 << (width - 1).bit_length()
    )


def store_fp8(query: Tensor, key: Tensor, value: Tensor, memory: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
    """Writes ``key`` and ``value`` [N, K, D], coded as by :class:`~penstock.ops.paged.codecs.fp8.Fp8`, to the ``slots``
    int64 [N] of ``memory`` uint8 [blocks, 2, block_size, K, D]. ``scales`` float32 [2, K], contiguous, are the layer's.

    Returns:
        ``query`` [N, H, D] times the scales of the keys, whose codes it is to be compared with.
    """
    from penstock.ops.paged.store_kernel import LANES, store_fp8_kernel

    (count, heads, dim), kv_heads = query.shape, key.shape[1]
    scaled = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    query, key, value = query.flatten(1), key.flatten(1), value.flatten(1)
    query_width, width = heads * dim, kv_heads * dim
    store_fp8_kernel[(count, -(-query_width // LANES) + -(-width // LANES))](
        query, key, value, scaled, memory, slots, scales, query.stride(0), key.stride(0), value.stride(0),
        memory.shape[2], query_width, width, heads // kv_heads, dim, LANES,
    )  # fmt: skip
    return scaled
