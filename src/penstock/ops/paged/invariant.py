"""Paged attention whose bits do not depend on the batch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.ops.attention import Extras
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache, StepShape
from penstock.ops.paged.cpu import Native, NativeCache
from penstock.ops.paged.cuda import CudaCache, store
from penstock.policy import policy

if TYPE_CHECKING:
    from penstock.ops.paged.walk import FixedWalk, Walk


class WalkedCache(CudaCache):
    """Attention by the kernels of :mod:`~penstock.ops.paged.walk`."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._fixed: dict[StepShape, tuple[Tensor, FixedWalk]] = {}
        self._planned: tuple[Tensor, Walk] | None = None
        self._fixed_plan: tuple[Tensor, FixedWalk] | None = None

    def fix(self, shapes: list[StepShape], pages: int) -> bool:
        from penstock.ops.paged.walk import FixedWalk

        for shape in shapes:
            if shape in self._fixed:
                continue
            slots = torch.zeros(shape.rows, dtype=torch.int64, device=self.shape.device)
            self._fixed[shape] = slots, FixedWalk(shape, self.shape, pages)
        return True

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        from penstock.ops.paged.walk import walk_of

        super().plan(batch, lane)
        slots = upload(batch.slots.numpy(), self.shape.device)
        if batch.shape is None:
            self._planned = slots, walk_of(batch, self.shape)
            return
        own_slots, fixed = self._fixed[batch.shape]
        own_slots.copy_(slots)
        fixed.fill(batch)
        self._planned, self._fixed_plan = (own_slots, fixed.walk), (own_slots, fixed)

    def advance(self, places: Tensor, more: Tensor, nowhere: int) -> None:
        assert self._fixed_plan is not None
        slots, fixed = self._fixed_plan
        fixed.advance(places, more, nowhere, slots)

    def compute(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None, extras: Extras
    ) -> Tensor:
        if self._planned is None:
            raise RuntimeError("attend() before plan()")
        slots, walk = self._planned
        memory = self.memory[layer]
        if self.shape.latent is None:
            store(key, value, memory, slots)
        else:  # of which the values are a part
            memory.view(-1, *key.shape[1:]).index_copy_(0, slots, key)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        walk.attend(query.contiguous(), memory, out, scale=scale, window=window, extras=extras)
        return out


#: The largest heads, and the largest latents by the bytes of a number, for which the kernels' tiles fit in a
#: multiprocessor; and what else the keys of latents may have.
HEAD, LATENTS, REST = 256, {2: 512, 4: 128}, 128


@policy("attention.paged", "invariant")
class Invariant(PagedAttention):
    """Attention whose every output has the same bits alone and in any batch, in a prompt of any chunks and when
    decoded, on any number of threads.

    Each query row walks its keys from the first on, in an order that depends on nothing but their places. On CPUs it is
    the native kernel, which here cuts no tile between threads; on CUDA devices a kernel of our own, for bf16, fp16 and
    fp32, with tiles and pieces of fixed size. One long sequence on many cores has no more threads than key heads then.

    Soft caps, sinks and chunks are computed everywhere, and on CUDA devices latent attention too: of a latent, which is
    key and value, a tile is read once for both. A sink joins the softmax behind the last piece, once. Passes of batches
    of a fixed shape can be replayed from a CUDA graph.
    """

    rank: ClassVar[int] = 5
    knows: ClassVar[frozenset[str]] = frozenset({"cap", "sinks", "chunk", "latent"})
    codecs: ClassVar[frozenset[str]] = Native.codecs

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type == "cpu":
            return Native().serves(device, dtype, head_dim)
        if device.type != "cuda":
            return "it needs the CPU or a CUDA device"
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return "it needs bf16, fp16 or fp32"
        if head_dim > HEAD:
            return f"its tiles hold heads of {HEAD} numbers at most"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None

    def refuses(self, shape: CacheShape) -> str | None:
        if shape.device.type == "cpu":
            return Native().refuses(shape) or self.lacks(shape.needs)
        if shape.codec.policy_name != "plain":
            return f"on CUDA devices it cannot read blocks in {shape.codec.policy_name}"
        if shape.latent is None:
            return super().refuses(shape)
        # What a latent is held in is not what a head is.
        if (reason := self.serves(shape.device, shape.dtype, 1) or self.lacks(shape.needs)) is not None:
            return reason
        most = LATENTS[shape.dtype.itemsize]
        if shape.latent > most or shape.head_dim - shape.latent > REST:
            return (
                f"its tiles hold latents of {most} numbers in {shape.dtype}, and {REST} more of a key, at most".replace(
                    "torch.", ""
                )
            )
        return None

    def open(self, shape: CacheShape) -> PagedCache:
        if shape.device.type == "cpu":
            return NativeCache(shape, whole_tiles=True)
        return WalkedCache(shape)
