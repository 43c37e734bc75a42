"""The fast backend for CPUs: one call of a native kernel for each layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from penstock.core import pages
from penstock.core.errors import PenstockError
from penstock.ops import native
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.contract import (
    ALL_LAYERS,
    CacheShape,
    PagedAttention,
    PagedBatch,
    PagedCache,
    slots_onward,
)
from penstock.ops.paged.cpu_windows import PADDING, PlannedWindows, WindowBlocks
from penstock.ops.paged.view import View
from penstock.policy import policy

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")

#: Spans of places, of one layer, that the kernel has room for.
MOST_SPANS = 7

#: Stands for no window, and for a chunk that has everything; the kernel adds places to it and takes them away, in 32
#: bits.
UNBOUNDED = 2**30


class _Memory(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slabs", "windows", "spilled")),
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "kv_heads", "head_dim", "blocks", "block_size", "window_blocks")
        ),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "tables", "slots")),
        *((name, ctypes.c_void_p) for name in ("positions", "before", "offsets", "seen")),
        *((name, ctypes.c_void_p) for name in ("behind", "spans")),
        *((name, ctypes.c_void_p) for name in ("window_tables", "since", "window_slots", "fetched", "returned")),
        *((name, ctypes.c_int64) for name in ("sequences", "table_width", "threads", "whole_tiles")),
        *((name, ctypes.c_int64) for name in ("span_count", "window", "fetches", "returns")),
    ]

    def see(self, batch: PagedBatch) -> None:
        """Takes its sequences and masks."""
        self._batch, self._masks = batch, _masks(batch)  # keeps alive what has the addresses that follow
        for name in ("starts", "lengths", "tables", "slots"):
            setattr(self, name, getattr(batch, name).data_ptr())
        for name, array in zip(("positions", "before", "offsets", "seen"), self._masks, strict=False):
            setattr(self, name, array.ctypes.data)
        self.sequences, self.table_width = batch.tables.shape

    def see_packed(self, view: View, packed: list[int]) -> None:
        """Takes that so many tokens of each sequence are ``packed`` as the ``view`` has it."""
        self._spans = spans_of(view, packed)
        self._behind = np.array([view.places(count) if count else 0 for count in packed], np.int32)
        self.behind, self.spans = self._behind.ctypes.data, self._spans.ctypes.data
        self.span_count = self._spans.shape[2]

    def see_windows(self, windows: PlannedWindows, tokens: int) -> None:
        """Takes that ``windows`` of so many ``tokens`` are in full precision."""
        self._windows = windows
        for name in ("tables", "since", "slots", "fetched", "returned"):
            field = name if name in ("since", "fetched", "returned") else f"window_{name}"
            setattr(self, field, getattr(windows, name).ctypes.data)
        self.window = tokens
        self.fetches, self.returns = len(windows.fetched), len(windows.returned)


class _Tokens(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((f"{name}_{step}", ctypes.c_int64) for name in ("query", "key", "value") for step in ("token", "head")),
        ("sinks", ctypes.c_void_p),
        ("cap", ctypes.c_double),
        ("chunk", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    ]


class NativeCache(PagedCache):
    """Keys and values as [layers, blocks, K, 2, block_size * n], where the codec stores n numbers for a vector: a
    head's keys transposed, [D, block_size], and its values, [block_size, D], so that the kernel fetches both in one
    piece and needs no sums across vector lanes. In int8, either is followed by its tokens' steps, [block_size, 4]
    bytes. Windows in full precision lie in blocks of the same kind, see :mod:`~penstock.ops.paged.cpu_windows`.

    Args:
        whole_tiles: no tile of work is cut between threads. It does not matter to a row's bits then what else there is
            to compute.
    """

    #: How often memory was taken.
    _allocated = 0

    def __init__(self, shape: CacheShape, whole_tiles: bool = False) -> None:
        super().__init__(shape)
        self._whole_tiles, learned, self._lasting = whole_tiles, shape.learned, _Batch()
        self._learned = None if learned is None else learned.float().contiguous()
        library, name = native.load(SOURCE), _numbers(shape.dtype, shape.codec)
        types: list[Any] = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_double, ctypes.c_int]
        self._attend = native.Function(library, f"attend_{name}", types)
        self._look = native.Function(library, f"look_{name}", [*types, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p])
        self._stray: Callable[..., int] = library.stray
        self._stray.argtypes, self._stray.restype = [ctypes.c_void_p] * 2, ctypes.c_int64

    def allocate(self) -> None:
        shape = self.shape
        _, dtype = shape.codec.stored(shape.head_dim, shape.dtype)
        per_block = shape.block_bytes // shape.layers // dtype.itemsize
        count = shape.layers * shape.blocks * per_block
        padded = pages.zeros([count + PADDING // dtype.itemsize], dtype, shape.device)
        self._memory = padded[:count].view(shape.layers, shape.blocks, per_block)
        # While nothing is served, the cache has one block, and no windows.
        self._windows = None if shape.residual is None or shape.blocks == 1 else WindowBlocks(shape)
        self._allocated += 1
        self._described = _Memory(
            self._memory.data_ptr(),
            *((None, None) if self._windows is None else (self._windows.memory.data_ptr(), None)),
            *(shape.heads, shape.kv_heads, shape.head_dim, shape.blocks, shape.block_size),
            0 if self._windows is None else self._windows.blocks,
        )

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        """Raises:
        IndexError: a block or slot of the batch lies outside the memory, or the batch contradicts itself.
        """
        super().plan(batch, lane)
        self._batch, self._planned = batch, self._describe(batch)
        if self._windows is not None and batch.rings is not None:
            windows = self._windows.plan(batch)
            self._planned.see_windows(windows, self._windows.window)
            self._described.spilled = windows.spilled.data_ptr()
        self._query_shape = (len(batch.slots), self.shape.heads, self.shape.head_dim)
        self._key_shape = (len(batch.slots), self.shape.kv_heads, self.shape.head_dim)
        # Whoever recorded an earlier pass looks for the plan where that one's was.
        ctypes.memmove(ctypes.addressof(self._lasting), ctypes.addressof(self._planned), ctypes.sizeof(_Batch))

    @property
    def recorded(self) -> Hashable | None:
        """Attention over this memory, for so many tokens, is one native call and no more, the same for all plans."""
        more = self.watch is not None or self._windows is not None or self._batch.contexts or self._batch.weighed
        return None if more else (self._allocated, len(self._batch.slots))

    @property
    def advances(self) -> bool:
        return self.watch is None and self._windows is None

    def advance(self, places: Tensor, more: Tensor, nowhere: int) -> None:
        # The plan has their addresses.
        batch = self._batch
        batch.slots.copy_(slots_onward(batch.tables, places, more, self.shape.block_size, nowhere))
        batch.lengths.add_(more.int())

    def _describe(self, batch: PagedBatch) -> _Batch:
        """``batch`` as the kernel takes it, but for windows.

        Raises:
            IndexError: as :meth:`plan`.
        """
        described = _Batch(threads=torch.get_num_threads(), whole_tiles=self._whole_tiles)
        described.see(batch)
        if self.shape.view is not None and batch.packed is not None:
            described.see_packed(self.shape.view, batch.packed.tolist())
        stray = self._stray(*map(ctypes.addressof, (self._described, described)))
        if stray >= 0:
            raise IndexError(f"sequence {stray} of the batch does not lie in the memory")
        return described

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
        if query.shape != self._query_shape or key.shape != self._key_shape or value.shape != self._key_shape:
            raise ValueError(f"{query.shape}, {key.shape} and {value.shape} do not fit the planned batch")
        self.note(layer, query, scale)
        query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        out, tokens = torch.empty(query.shape, dtype=self.shape.dtype), _Tokens()
        tokens.query, tokens.key, tokens.value, tokens.out = (x.data_ptr() for x in (query, key, value, out))
        tokens.query_token, tokens.query_head, _ = query.stride()
        tokens.key_token, tokens.key_head, _ = key.stride()
        tokens.value_token, tokens.value_head, _ = value.stride()
        sinks = None if extras.sinks is None else extras.sinks.detach().double()
        tokens.sinks = None if sinks is None else sinks.data_ptr()
        tokens.cap, tokens.chunk = extras.cap or 0.0, UNBOUNDED if extras.chunk is None else extras.chunk
        tokens.scales = self._scales(layer)
        places = map(ctypes.addressof, (self._described, self._lasting, tokens))
        native.keep(tokens, sinks)
        self._attend(*places, layer, scale, UNBOUNDED if window is None else window)
        self.see_contexts(self._batch, layer, query, out, scale)
        self.weigh(self._batch, layer, query, scale, window, extras)
        return out

    def _scales(self, layer: int) -> int | None:
        """Where the scales of a layer's codes are."""
        return None if self._learned is None else self._learned[layer].data_ptr()

    def looks(
        self, layers: slice, queries: Tensor, scales: Sequence[float], slots: Tensor, packed: int = 0
    ) -> Tensor | None:
        _, sequences, count, heads, dim = queries.shape
        view, places = self.shape.view, slots.shape[1]
        own, kept, missing = places, 0, (0,) * self.shape.layers
        if packed:
            assert view is not None
            own, missing = places - view.places(packed), view.missing(packed)
            kept = missing[0] + sum(end - first for _, first, end in view.spans(packed)[0])
        if own < count:  # some of those who look lie among those who are packed
            return None
        table, lengths = slots[:, :: self.shape.block_size] // self.shape.block_size, torch.full((sequences,), places)
        looking = PagedBatch(
            torch.arange(sequences + 1, dtype=torch.int32) * count,
            lengths.to(torch.int32),
            table.to(torch.int32).contiguous(),
            slots[:, places - count :].flatten(),
            packed=torch.full((sequences,), packed, dtype=torch.int32) if packed else None,
        )
        described, tokens = self._describe(looking), _Tokens(chunk=UNBOUNDED)
        tokens.query_token, tokens.query_head = heads * dim, dim
        found = torch.empty(len(queries), sequences, self.shape.kv_heads, count, kept + own)
        numbers = range(self.shape.layers)[layers]
        addresses = [ctypes.addressof(each) for each in (self._described, described, tokens)]
        for layer, asked, scale, out in zip(numbers, queries.contiguous(), scales, found, strict=True):
            tokens.query, tokens.scales = asked.data_ptr(), self._scales(layer)
            self._look(*addresses, layer, scale, UNBOUNDED, missing[layer], kept + own, out.data_ptr())
        return found

    def copy(self, sources: list[int], targets: list[int]) -> None:
        self._memory[:, targets] = self._memory[:, sources]

    def codes(self, slots: Tensor, layers: slice = ALL_LAYERS) -> list[Tensor]:
        block, place = slots // self.shape.block_size, slots % self.shape.block_size
        found = [part[layers][:, block, place].transpose(1, 2) for part in self._parts()]
        return [torch.cat(found[which::2], -1) for which in (0, 1)]

    def put(self, slots: Tensor, codes: Sequence[Tensor]) -> None:
        block, place, parts = slots // self.shape.block_size, slots % self.shape.block_size, self._parts()
        for which, own in enumerate(codes):
            pieces = torch.split(own.transpose(1, 2), [part.shape[-1] for part in parts[which::2]], -1)
            for part, piece in zip(parts[which::2], pieces, strict=True):
                part[:, block, place] = piece

    def _parts(self) -> list[Tensor]:
        """Views of all that is kept, each [layers, blocks, block_size, K, m]: keys, values, and in int8 their steps."""
        shape, size, dim = self.shape, self.shape.block_size, self.shape.head_dim
        halves = self._memory.view(shape.layers, shape.blocks, shape.kv_heads, 2, -1)
        (keys, values), steps = halves[..., : size * dim].unbind(3), halves[..., size * dim :]
        parts = [keys.view(*keys.shape[:3], dim, size).mT, values.view(*values.shape[:3], size, dim)]
        if steps.shape[-1]:
            parts += steps.view(*steps.shape[:4], size, -1).unbind(3)
        return [part.transpose(2, 3) for part in parts]


def _numbers(dtype: torch.dtype, codec: Codec) -> str:
    """What the kernel's functions for queries of ``dtype`` over blocks in ``codec`` are named by."""
    over = {
        "plain": "",
        "bf16": "" if dtype == torch.bfloat16 else "_over_bfloat16",
        "int8": "_over_int8",
        "fp8": "_over_e4m3",
    }
    return f"{dtype}{over[codec.policy_name]}".replace("torch.", "")


def spans_of(view: View, packed: Sequence[int]) -> np.ndarray:
    """Of sequences of which so many tokens are ``packed``, the :meth:`~penstock.ops.paged.view.View.spans` of each
    layer, int32 [layers, B, n, 3]; empty ones fill up."""
    found = [view.spans(count) if count else () for count in packed]
    layers = max(map(len, found))
    most = max((len(own) for each in found for own in each), default=0)
    if most > MOST_SPANS:
        raise ValueError(f"a layer's tokens lie in {most} spans of places, and the kernel has room for {MOST_SPANS}")
    spans = np.zeros((layers, len(packed), most, 3), np.int32)
    for sequence, each in enumerate(found):
        for layer, own in enumerate(each):
            spans[layer, sequence, : len(own)] = own
    return spans


def _masks(batch: PagedBatch) -> tuple[np.ndarray, ...]:
    """What the kernel takes of masks; nothing where there are none."""
    masks = batch.masks
    if masks is None:
        return ()
    before, offsets = batch.lengths.numpy().astype(np.int64), np.zeros(len(batch.lengths), np.int64)
    before[masks.sequences], offsets[masks.sequences] = masks.before, masks.offsets[:-1]
    return masks.positions, before, offsets, masks.seen


@policy("attention.paged", "cpu", papers=[441])
class Native(PagedAttention):
    """Attention in C++, compiled on first use: online softmax over blocks, with the work dealt evenly to all threads.

    From the Lean Attention paper [441]: all work of a step (sequences, heads, keys) is laid end to end in equal tiles
    of keys and cut into one equal share for each thread, whatever sequence or head the cut goes through; the parts of a
    head are then merged exactly, by their log-sum-exp. So one long sequence keeps all threads busy. Ours: prefill is
    dealt out in the same way as decoding, a tile of keys counting by the query rows that are computed on it.

    Windows in full precision, and tokens of some layers in the places of others, are further pieces of what a tile's
    rows see, in the same running softmax.

    float32, float64 and bfloat16; sums are kept in float32, or float64 for float64. A cut may move with the rest of the
    batch, and with it the last bits of an output. Of blocks in int8 the codes are read as they are: the steps of keys
    are multiplied to scores, and those of values to weights; and so are, in fp8, the scales of heads.
    """

    rank: ClassVar[int] = 10
    knows: ClassVar[frozenset[str]] = frozenset({"cap", "sinks", "chunk", "contexts", "weighed", "view", "residual"})
    codecs: ClassVar[frozenset[str]] = frozenset({"plain", "bf16", "int8", "fp8"})

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cpu":
            return "it needs the CPU"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16):
            return f"it does not know {dtype}".replace("torch.", "")
        try:
            native.load(SOURCE)
        except PenstockError as error:
            return error.what
        return None

    def refuses(self, shape: CacheShape) -> str | None:
        if shape.dtype == torch.float64 and shape.codec.policy_name != "plain":
            return "it reads codes in float32 and bfloat16 alone"
        if shape.view is not None and not shape.view.plain:
            return f"it has no view of {shape.view.holds}"
        return super().refuses(shape)

    def open(self, shape: CacheShape) -> PagedCache:
        return NativeCache(shape)
