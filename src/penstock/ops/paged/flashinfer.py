"""Paged attention with FlashInfer's kernels, on CUDA devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.policy import policy

#: Bytes that the kernels keep partial results in.
WORKSPACE = 256 * 2**20

#: Head sizes that the kernels are built for.
HEAD_DIMS = (64, 128, 256)

_caches: weakref.WeakValueDictionary[int, FlashInferCache] = weakref.WeakValueDictionary()
_handles = itertools.count()


@torch.library.custom_op("penstock::attend_flashinfer", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, cache: int, layer: int, window: int) -> Tensor:
    # One opaque operator to torch.compile: what it does to the cache is nobody else's business.
    return _caches[cache].compute(query, key, value, layer, window)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cache: int, layer: int, window: int) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


class Section(NamedTuple):
    """Neighbouring rows of a flat batch that one kernel attends for: its planned wrapper for each window."""

    rows: slice
    wrappers: dict[int, Any]


@dataclasses.dataclass
class Planned:
    """What the kernels need of a batch: where new keys and values go, and who attends for which rows."""

    slots: Tensor
    sections: list[Section]


@dataclasses.dataclass
class Lane:
    """What passes that do not overlap share: memory for partial results, a wrapper of each kind for each window, and
    when the last plan has left the host."""

    workspace: Tensor
    prefill: dict[int, Any]
    decode: dict[int, Any]
    copied: torch.cuda.Event


class FlashInferCache(PagedCache):
    """Keys and values as [layers, blocks, 2, block_size, K, D]."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._memory = torch.zeros(
            (shape.layers, shape.blocks, 2, shape.block_size, shape.kv_heads, shape.head_dim),
            dtype=shape.dtype,
            device=shape.device,
        )
        self._windows = {-1 if window is None else window - 1 for window in shape.windows}
        self._lanes = [self._lane()]
        self._fixed: dict[int, Planned] = {}
        self._planned: Planned | None = None
        self._handle = next(_handles)
        _caches[self._handle] = self

    def _lane(self) -> Lane:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=self.shape.device)

        def wrappers(backend: str) -> dict[int, Any]:
            return {
                window: BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
                for window in self._windows
            }

        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Decodes too: FlashInfer's wrapper for them copies from memory that is not pinned, unless its buffers are
        # fixed, and runs the kernel of this one, "fa2", where a key head has several queries.
        return Lane(workspace, wrappers("auto"), wrappers("fa2"), copied)

    def fix(self, sizes: list[int], pages: int) -> bool:
        for size in sizes:
            slots = torch.zeros(size, dtype=torch.int64, device=self.shape.device)
            self._fixed[size] = Planned(slots, [Section(slice(0, size), self._fixed_wrappers(size, size * pages))])
        return True

    def _fixed_wrappers(self, size: int, pages: int) -> dict[int, Any]:
        """A wrapper for each window, for decode batches of one ``size``, whose buffers stay where they are."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        def buffer(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self.shape.device)

        return {
            window: BatchDecodeWithPagedKVCacheWrapper(
                self._lanes[0].workspace,
                "NHD",
                use_cuda_graph=True,
                # With two or more queries to a key head, the tensor cores' kernel reads each key once.
                use_tensor_cores=self.shape.heads > self.shape.kv_heads,
                paged_kv_indptr_buffer=buffer(size + 1),
                paged_kv_indices_buffer=buffer(pages),
                paged_kv_last_page_len_buffer=buffer(size),
            )
            for window in self._windows
        }

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        while lane >= len(self._lanes):
            self._lanes.append(self._lane())
        own = self._lanes[lane]
        # The copies of the lane's last plan leave from memory that this one writes to.
        own.copied.synchronize()
        slots = _pinned(batch.slots.numpy())
        # Graphs are replayed in lane 0 alone: elsewhere a pass would write to the plan of one that runs beside it.
        fixed = self._fixed.get(len(batch.lengths)) if batch.longest == 1 and lane == 0 else None
        if fixed is not None:
            fixed.slots.copy_(slots, non_blocking=True)
            pages, given = self._pages(batch, slice(0, len(batch.lengths)))
            for window, wrapper in fixed.sections[0].wrappers.items():
                wrapper.plan(*pages, head_dim=self.shape.head_dim, window_left=window, **given)
            self._planned = fixed
        else:
            sections = self._sections(batch, own)
            for section in sections:
                self._plan_section(section, batch, causal=section.wrappers is own.prefill)
            self._planned = Planned(slots.to(self.shape.device, non_blocking=True), sections)
        own.copied.record()

    def _sections(self, batch: PagedBatch, lane: Lane) -> list[Section]:
        """The leading sequences with one new token each, for the kernel that splits their keys, and the others."""
        several = np.flatnonzero(np.diff(batch.starts.numpy()) > 1)
        single, count = (int(several[0]) if len(several) else len(batch.lengths)), len(batch.slots)
        sections = [Section(slice(0, single), lane.decode), Section(slice(single, count), lane.prefill)]
        return [section for section in sections if section.rows.start < section.rows.stop]

    def _plan_section(self, section: Section, batch: PagedBatch, causal: bool) -> None:
        starts = batch.starts.numpy()
        first, behind = np.searchsorted(starts, [section.rows.start, section.rows.stop])
        own = starts[first : behind + 1]
        queries, (pages, given) = _pinned(own - own[0]), self._pages(batch, slice(first, behind))
        given |= {"head_dim_qk": self.shape.head_dim, "max_token_per_sequence": int(np.diff(own).max())}
        for window, wrapper in section.wrappers.items():
            wrapper.plan(queries, *pages, causal=causal, window_left=window, **given)

    def _pages(self, batch: PagedBatch, sequences: slice) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """What plans take of some ``sequences``: the ends of their lists of blocks, the blocks, and how many tokens the
        last has; and by name, what says how to read them."""
        size, lengths = self.shape.block_size, batch.lengths.numpy()[sequences]
        tables, counts = batch.tables.numpy()[sequences], -(-lengths // size)
        ends = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        blocks = upload(tables[np.arange(tables.shape[1]) < counts[:, None]], self.shape.device)
        given = {
            "num_qo_heads": self.shape.heads,
            "num_kv_heads": self.shape.kv_heads,
            "page_size": size,
            "q_data_type": self.shape.dtype,
            "kv_data_type": self.shape.dtype,
            # Need not be computed again then, nor copied from memory that is not pinned.
            "seq_lens": _pinned(lengths),
        }
        return (_pinned(ends), blocks, _pinned(lengths - (counts - 1) * size)), given

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        usual = self.shape.head_dim**-0.5
        if scale != usual:
            query = query * (scale / usual)
        out: Tensor = _attend(query, key, value, self._handle, layer, -1 if window is None else window - 1)
        return out

    def compute(self, query: Tensor, key: Tensor, value: Tensor, layer: int, window: int) -> Tensor:
        """:meth:`attend`, as the operator calls it."""
        planned = self._planned
        if planned is None:
            raise RuntimeError("attend() before plan()")
        memory = self._memory[layer]
        store(key, value, memory, planned.slots)
        query = query.contiguous()
        out = torch.empty_like(query)
        for rows, wrappers in planned.sections:
            wrappers[window].run(query[rows], memory, out=out[rows])
        return out

    def copy(self, sources: list[int], targets: list[int]) -> None:
        source, target = (upload(np.array(blocks), self.shape.device) for blocks in (sources, targets))
        self._memory[:, target] = self._memory[:, source]


def _pinned(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).pin_memory()


def store(key: Tensor, value: Tensor, memory: Tensor, slots: Tensor) -> None:
    """Writes ``key`` and ``value`` [N, K, D] to the ``slots`` int64 [N] of ``memory`` [blocks, 2, block_size, K, D]."""
    from penstock.ops.paged.store import store_kernel

    # Views, where the heads of a token lie side by side.
    key, value = key.flatten(1), value.flatten(1)
    width = key.shape[1]
    store_kernel[(key.shape[0],)](
        key, value, memory, slots, key.stride(0), value.stride(0), memory.shape[2], width, 1 << (width - 1).bit_length()
    )


@policy("attention.paged", "flashinfer")
class FlashInfer(PagedAttention):
    """FlashInfer's paged kernels: the split-KV kernel for decoding, FlashAttention 3 on Hopper where sequences have
    several new tokens. In a batch with both, sequences that decode have the former where they come first, as under
    every batching policy that takes them first. Plans of decode batches of a fixed size can be replayed from a CUDA
    graph.
    """

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return "it needs a CUDA device"
        if dtype not in (torch.bfloat16, torch.float16):
            return "it needs bf16 or fp16"
        if head_dim not in HEAD_DIMS:
            return f"it has no kernels for heads of {head_dim}"
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed (pip install 'penstock[cuda]')"
        return None

    def open(self, shape: CacheShape) -> PagedCache:
        return FlashInferCache(shape)
