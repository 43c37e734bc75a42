"""Paged attention with FlashInfer's kernels, on CUDA devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from penstock.core.devices import pinned, upload
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache, StepShape
from penstock.policy import policy

#: Bytes that the kernels keep partial results in.
WORKSPACE = 256 * 2**20

#: Head sizes that the kernels are built for.
HEAD_DIMS = (64, 128, 256)

_caches: weakref.WeakValueDictionary[int, FlashInferCache] = weakref.WeakValueDictionary()
_handles = itertools.count()


@custom_op("penstock::attend_flashinfer", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, cache: int, layer: int, window: int) -> Tensor:
    # One opaque operator to torch.compile: what it does to the cache is nobody else's business.
    return _caches[cache].compute(query, key, value, layer, window)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cache: int, layer: int, window: int) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


class Section(NamedTuple):
    """Neighbouring rows of a flat batch that one kernel attends for: its wrapper for each window, and whether that is
    FlashInfer's for decodes."""

    rows: slice
    wrappers: dict[int, Any]
    decode: bool = False


class Pages(NamedTuple):
    """What plans take of the sequences of a section, all int32: where the new tokens of each start, and behind them;
    where its list of blocks starts, and behind them; the blocks; how many tokens the last has; and how many it has."""

    starts: np.ndarray
    ends: np.ndarray
    blocks: np.ndarray
    last: np.ndarray
    lengths: np.ndarray


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
        self._fixed: dict[StepShape, Planned] = {}
        self._fixed_decode: dict[int, dict[int, Any]] = {}
        self._fixed_prefill: dict[tuple[int, int], dict[int, Any]] = {}
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

    def fix(self, shapes: list[StepShape], pages: int) -> bool:
        for shape in shapes:
            singles, others, tokens = shape
            sections = []
            if singles:
                if singles not in self._fixed_decode:
                    self._fixed_decode[singles] = self._decode_wrappers(singles, singles * pages)
                sections.append(Section(slice(0, singles), self._fixed_decode[singles], decode=True))
            if others:
                if (others, tokens) not in self._fixed_prefill:
                    most = others * pages + -(-tokens // self.shape.block_size)
                    self._fixed_prefill[others, tokens] = self._prefill_wrappers(others, most)
                sections.append(Section(slice(singles, shape.rows), self._fixed_prefill[others, tokens]))
            slots = torch.zeros(shape.rows, dtype=torch.int64, device=self.shape.device)
            self._fixed[shape] = Planned(slots, sections)
        return True

    def _decode_wrappers(self, sequences: int, pages: int) -> dict[int, Any]:
        """A wrapper for each window, for ``sequences`` with one new token each, whose buffers stay where they are."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        return {
            window: BatchDecodeWithPagedKVCacheWrapper(
                self._lanes[0].workspace,
                "NHD",
                use_cuda_graph=True,
                # With two or more queries to a key head, the tensor cores' kernel reads each key once.
                use_tensor_cores=self.shape.heads > self.shape.kv_heads,
                paged_kv_indptr_buffer=self._buffer(sequences + 1),
                paged_kv_indices_buffer=self._buffer(pages),
                paged_kv_last_page_len_buffer=self._buffer(sequences),
            )
            for window in self._windows
        }

    def _prefill_wrappers(self, sequences: int, pages: int) -> dict[int, Any]:
        """The same for ``sequences`` with several new tokens, as many in all each time."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        return {
            window: BatchPrefillWithPagedKVCacheWrapper(
                self._lanes[0].workspace,
                "NHD",
                use_cuda_graph=True,
                qo_indptr_buf=self._buffer(sequences + 1),
                paged_kv_indptr_buf=self._buffer(sequences + 1),
                paged_kv_indices_buf=self._buffer(pages),
                paged_kv_last_page_len_buf=self._buffer(sequences),
            )
            for window in self._windows
        }

    def _buffer(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.shape.device)

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        while lane >= len(self._lanes):
            self._lanes.append(self._lane())
        own = self._lanes[lane]
        # The copies of the lane's last plan leave from memory that this one writes to.
        own.copied.synchronize()
        fixed = None if batch.shape is None else self._fixed[batch.shape]
        sections = self._sections(batch, own) if fixed is None else fixed.sections
        pages = [self._pages(batch, section) for section in sections]
        slots, *blocks = _together(
            upload, [batch.slots.numpy().view(np.int32), *(each.blocks for each in pages)], self.shape.device
        )
        if fixed is None:
            self._planned = Planned(slots.view(torch.int64), sections)
        else:
            fixed.slots.copy_(slots.view(torch.int64))
            self._planned = fixed
        for section, each, own_blocks in zip(sections, pages, blocks, strict=True):
            self._plan_section(section, each, own_blocks)
        own.copied.record()

    def _sections(self, batch: PagedBatch, lane: Lane) -> list[Section]:
        """The leading sequences with one new token each, for the kernel that splits their keys, and the others."""
        singles, _, tokens = batch.own_shape
        sections = [Section(slice(0, singles), lane.decode), Section(slice(singles, singles + tokens), lane.prefill)]
        return [section for section in sections if section.rows.start < section.rows.stop]

    def _plan_section(self, section: Section, pages: Pages, blocks: Tensor) -> None:
        """Plans the ``pages``, whose ``blocks`` are on the device already."""
        pieces = [pages.starts, pages.ends, pages.last, pages.lengths]
        starts, ends, last, lengths = _together(pinned, pieces, self.shape.device)
        given = {
            "num_qo_heads": self.shape.heads,
            "num_kv_heads": self.shape.kv_heads,
            "page_size": self.shape.block_size,
            "q_data_type": self.shape.dtype,
            "kv_data_type": self.shape.dtype,
            # Need not be computed again then, nor copied from memory that is not pinned.
            "seq_lens": lengths,
        }
        where: tuple[Tensor, ...] = ends, blocks, last
        if section.decode:
            given["head_dim"] = self.shape.head_dim
        else:
            longest = int(np.diff(pages.starts).max())
            where = starts, *where
            given |= {"head_dim_qk": self.shape.head_dim, "max_token_per_sequence": longest, "causal": longest > 1}
        for window, wrapper in section.wrappers.items():
            wrapper.plan(*where, window_left=window, **given)

    def _pages(self, batch: PagedBatch, section: Section) -> Pages:
        starts = batch.starts.numpy()
        first, behind = np.searchsorted(starts, [section.rows.start, section.rows.stop])
        own, size = slice(first, behind), self.shape.block_size
        lengths, tables = batch.lengths.numpy()[own], batch.tables.numpy()[own]
        counts = -(-lengths // size)
        return Pages(
            starts=starts[first : behind + 1] - starts[first],
            ends=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
            blocks=tables[np.arange(tables.shape[1]) < counts[:, None]],
            last=lengths - (counts - 1) * size,
            lengths=lengths,
        )

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
        for section in planned.sections:
            section.wrappers[window].run(query[section.rows], memory, out=out[section.rows])
        return out

    def copy(self, sources: list[int], targets: list[int]) -> None:
        source, target = (upload(np.array(blocks), self.shape.device) for blocks in (sources, targets))
        self._memory[:, target] = self._memory[:, source]


def _together(
    copy: Callable[[np.ndarray, torch.device], Tensor], pieces: list[np.ndarray], device: torch.device
) -> Sequence[Tensor]:
    """Copies of the ``pieces``, by one ``copy``: what that costs hardly depends on the size of such lists."""
    return copy(np.concatenate(pieces), device).split_with_sizes([len(piece) for piece in pieces])


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
    several new tokens. In a batch with both, sequences that decode have the former where they come first, as they do in
    every step of the engine. Passes of batches of a fixed shape can be replayed from a CUDA graph.
    """

    rank: ClassVar[int] = 20

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
