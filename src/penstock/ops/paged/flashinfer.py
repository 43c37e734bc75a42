"""Paged attention with FlashInfer's kernels, on CUDA devices."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import pinned, upload
from penstock.core.progress import Reporter, silent
from penstock.ops.attention import Extras
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache, StepShape
from penstock.ops.paged.cuda import CudaCache, store, store_fp8
from penstock.ops.paged.flashinfer_kernels import build_kernels, kept_dtype
from penstock.ops.paged.flashinfer_windows import WindowedAttention
from penstock.ops.paged.residual import Rings
from penstock.policy import policy

if TYPE_CHECKING:
    from penstock.ops.paged.walk import FixedWalk, Walk

#: Bytes that the kernels keep partial results in.
WORKSPACE = 256 * 2**20
#: And those for the plan of a fixed shape, as many as FlashInfer takes for each.
PLAN = 8 * 2**20

#: Head sizes that the kernels are built for.
HEAD_DIMS = (64, 128, 256)


class Section(NamedTuple):
    """Rows of a flat batch that one kernel attends for, by their numbers where they are not neighbours: its wrapper for
    each window, and whether that is FlashInfer's for decodes."""

    rows: slice | Tensor
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
    """What the kernels need of a batch: where new keys and values go, who attends for which rows, and the walk of the
    sequences that have masks; of a fixed shape whose sequences may have some, or that goes on, of all of them."""

    slots: Tensor
    sections: list[Section]
    masked: Walk | None = None
    fixed: FixedWalk | None = None


@dataclasses.dataclass
class Lane:
    """What passes that do not overlap share: memory for partial results, a wrapper of each kind for each window, when
    the last plan has left the host, and attention where the newest tokens are in full precision."""

    workspace: Tensor
    prefill: dict[int, Any]
    decode: dict[int, Any]
    copied: torch.cuda.Event
    windowed: WindowedAttention | None = None


class FlashInferCache(CudaCache):
    """Attention by FlashInfer's kernels, and by ours where a sequence has a mask: FlashInfer wants a mask over all of
    the keys, and waits for the device while it packs it."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._windows = {-1 if window is None else window - 1 for window in shape.windows}
        self._value_scales = None if shape.learned is None else scales_of_outputs(shape, shape.learned)
        self._lanes = [self._lane()]
        self._fixed: dict[StepShape, Planned] = {}
        self._fixed_decode: dict[int, dict[int, Any]] = {}
        self._fixed_prefill: dict[tuple[int, int], dict[int, Any]] = {}
        #: By window: one shape at a time is planned, and replayed before another one is.
        self._plans = {window: torch.zeros(PLAN, dtype=torch.uint8, device=shape.device) for window in self._windows}
        self._planned: Planned | None = None
        self._windowed: WindowedAttention | None = None

    def allocate(self) -> None:
        super().allocate()
        # While nothing is served, the cache has one block, and no windows.
        self._rings = None if self.shape.residual is None or self.shape.blocks == 1 else Rings(self.shape)

    def _lane(self) -> Lane:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=self.shape.device)

        def wrappers(backend: str) -> dict[int, Any]:
            return {
                window: BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
                for window in self._windows
            }

        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        windowed = None
        if self.shape.residual is not None:
            windowed = WindowedAttention(self.shape, workspace, kept_dtype(self.shape))
        # Decodes too: FlashInfer's wrapper for them copies from memory that is not pinned, unless its buffers are
        # fixed, and runs the kernel of this one, "fa2", where a key head has several queries.
        return Lane(workspace, wrappers("auto"), wrappers("fa2"), copied, windowed)

    def fix(self, shapes: list[StepShape], pages: int) -> bool:
        if any(shape.onward for shape in shapes) and self.shape.codec.policy_name != "plain":
            return False
        if self.shape.residual is not None:
            return False
        for shape in shapes:
            if shape in self._fixed:
                continue
            singles, others, tokens, masked, onward = shape
            slots, sections = torch.zeros(shape.rows, dtype=torch.int64, device=self.shape.device), []
            if masked or onward:
                from penstock.ops.paged.walk import FixedWalk

                self._refuse_codes()
                walk = FixedWalk(shape, self.shape, pages)
                self._fixed[shape] = Planned(slots, [], walk.walk, walk)
                continue
            if singles:
                if singles not in self._fixed_decode:
                    self._fixed_decode[singles] = self._decode_wrappers(singles, singles * pages)
                sections.append(Section(slice(0, singles), self._fixed_decode[singles], decode=True))
            if others:
                if (others, tokens) not in self._fixed_prefill:
                    most = others * pages + -(-tokens // self.shape.block_size)
                    self._fixed_prefill[others, tokens] = self._prefill_wrappers(others, most)
                sections.append(Section(slice(singles, shape.rows), self._fixed_prefill[others, tokens]))
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

        workspace = self._lanes[0].workspace
        wrappers = {
            window: BatchPrefillWithPagedKVCacheWrapper(
                workspace,
                "NHD",
                use_cuda_graph=True,
                qo_indptr_buf=self._buffer(sequences + 1),
                paged_kv_indptr_buf=self._buffer(sequences + 1),
                paged_kv_indices_buf=self._buffer(pages),
                paged_kv_last_page_len_buf=self._buffer(sequences),
            )
            for window in self._windows
        }
        for window, wrapper in wrappers.items():
            wrapper.reset_workspace_buffer(workspace, self._plans[window])
        return wrappers

    def _buffer(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.shape.device)

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        super().plan(batch, lane)
        while lane >= len(self._lanes):
            self._lanes.append(self._lane())
        own = self._lanes[lane]
        self._windowed = own.windowed if self._rings is not None and batch.rings is not None else None
        if self._windowed is not None and self._rings is not None:
            # As below.
            own.copied.synchronize()
            self._rings.plan(batch)
            self._windowed.plan(batch)
            self._planned = Planned(upload(batch.slots.numpy(), self.shape.device), [])
            own.copied.record(torch.cuda.current_stream(self.shape.device))
            return
        fixed = None if batch.shape is None else self._fixed[batch.shape]
        if fixed is not None and fixed.fixed is not None:
            fixed.slots.copy_(upload(batch.slots.numpy(), self.shape.device))
            fixed.fixed.fill(batch)
            self._planned = fixed
            return
        # The copies of the lane's last plan leave from memory that this one writes to.
        own.copied.synchronize()
        if fixed is not None and batch.masks is not None:
            raise ValueError("a batch with masks cannot be one of a fixed shape that has none")
        members = self._members(batch)
        sections = self._sections(batch, members, own) if fixed is None else fixed.sections
        pages = [self._pages(batch, sequences) for sequences in members]
        slots, *blocks = _together(
            upload, [batch.slots.numpy().view(np.int32), *(each.blocks for each in pages)], self.shape.device
        )
        if fixed is None:
            self._planned = Planned(slots.view(torch.int64), sections, self._walk(batch))
        else:
            fixed.slots.copy_(slots.view(torch.int64))
            self._planned = fixed
        for section, each, own_blocks in zip(sections, pages, blocks, strict=True):
            self._plan_section(section, each, own_blocks)
        own.copied.record(torch.cuda.current_stream(self.shape.device))

    def advance(self, places: Tensor, more: Tensor, nowhere: int) -> None:
        assert self._planned is not None and self._planned.fixed is not None
        self._planned.fixed.advance(places, more, nowhere, self._planned.slots)

    def _members(self, batch: PagedBatch) -> list[np.ndarray]:
        """The sequences of each section: the leading ones with one new token each, for the kernel that splits their
        keys, and the others that have no mask. A batch of a fixed shape has as many of the former as that says."""
        singles, count = (batch.shape or batch.own_shape).singles, len(batch.lengths)
        others = np.arange(singles, count)
        if batch.masks is not None:
            others = np.setdiff1d(others, batch.masks.sequences)
        return [sequences for sequences in (np.arange(singles), others) if sequences.size]

    def _sections(self, batch: PagedBatch, members: list[np.ndarray], lane: Lane) -> list[Section]:
        starts, sections = batch.starts.numpy(), []
        for sequences in members:
            first, last = sequences[0], sequences[-1]
            rows: slice | Tensor = slice(int(starts[first]), int(starts[last + 1]))
            if last - first >= len(sequences):
                own = [np.arange(starts[each], starts[each + 1]) for each in sequences]
                rows = upload(np.concatenate(own), self.shape.device)
            sections.append(Section(rows, lane.decode if first < batch.own_shape.singles else lane.prefill))
        return sections

    def _walk(self, batch: PagedBatch) -> Walk | None:
        if batch.masks is None:
            return None
        from penstock.ops.paged.walk import walk_of

        self._refuse_codes()
        return walk_of(batch, self.shape, batch.masks.sequences)

    def _refuse_codes(self) -> None:
        """Masks are for kernels that read numbers as they are."""
        if self.shape.codec.policy_name != "plain":
            raise ValueError(f"masks are not for blocks in {self.shape.codec.policy_name}")

    def _plan_section(self, section: Section, pages: Pages, blocks: Tensor) -> None:
        """Plans the ``pages``, whose ``blocks`` are on the device already."""
        pieces = [pages.starts, pages.ends, pages.last, pages.lengths]
        starts, ends, last, lengths = _together(pinned, pieces, self.shape.device)
        given = {
            "num_qo_heads": self.shape.heads,
            "num_kv_heads": self.shape.kv_heads,
            "page_size": self.shape.block_size,
            "q_data_type": self.shape.dtype,
            "kv_data_type": kept_dtype(self.shape),
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

    def _pages(self, batch: PagedBatch, sequences: np.ndarray) -> Pages:
        size = self.shape.block_size
        lengths, tables = batch.lengths.numpy()[sequences], batch.tables.numpy()[sequences]
        counts = -(-lengths // size)
        return Pages(
            starts=_edges(np.diff(batch.starts.numpy())[sequences]),
            ends=_edges(counts),
            blocks=tables[np.arange(tables.shape[1]) < counts[:, None]],
            last=lengths - (counts - 1) * size,
            lengths=lengths,
        )

    def compute(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None, extras: Extras
    ) -> Tensor:
        planned, plain = self._planned, query
        if planned is None:
            raise RuntimeError("attend() before plan()")
        shape, memory, learned = self.shape, self.memory[layer], self.shape.learned
        if learned is None:
            store(key, value, memory, planned.slots)
            query = query.contiguous()
        else:
            query = store_fp8(query, key, value, memory, planned.slots, learned[layer])
        memory = memory.view(kept_dtype(shape))
        if self._windowed is not None and self._rings is not None:
            factor = scale * shape.head_dim**0.5
            scales = None if self._value_scales is None else self._value_scales[layer]
            queries = (plain * factor).contiguous(), query * factor
            return self._windowed.attend(layer, *queries, key, value, memory, self._rings, scales)
        out = torch.empty_like(query)
        if planned.masked is not None:
            planned.masked.attend(query, memory, out, scale=scale, window=window)
        usual = shape.head_dim**-0.5
        if scale != usual:
            query = query * (scale / usual)
        for section in planned.sections:
            wrapper = section.wrappers[-1 if window is None else window - 1]
            if isinstance(section.rows, slice):
                wrapper.run(query[section.rows], memory, out=out[section.rows])
            else:
                out[section.rows] = wrapper.run(query[section.rows], memory)
        # In place it is one kernel, which multiplies in float32.
        return out if self._value_scales is None else out.mul_(self._value_scales[layer])


def scales_of_outputs(shape: CacheShape, learned: Tensor) -> Tensor:
    """The scales of values in fp8, of ``learned`` [layers, 2, K], for each query head: [layers, H, 1]."""
    return learned[:, 1].repeat_interleave(shape.heads // shape.kv_heads, 1).unsqueeze(-1)


def _edges(counts: np.ndarray) -> np.ndarray:
    """Where pieces of such sizes start, and behind the last: int32."""
    return np.concatenate([[0], counts.cumsum()]).astype(np.int32)


def _together(
    copy: Callable[[np.ndarray, torch.device], Tensor], pieces: list[np.ndarray], device: torch.device
) -> Sequence[Tensor]:
    """Copies of the ``pieces``, by one ``copy``: what that costs hardly depends on the size of such lists."""
    return copy(np.concatenate(pieces), device).split_with_sizes([len(piece) for piece in pieces])


@policy("attention.paged", "flashinfer")
class FlashInfer(PagedAttention):
    """FlashInfer's paged kernels: the split-KV kernel for decoding, FlashAttention 3 on Hopper where sequences have
    several new tokens. In a batch with both, sequences that decode have the former where they come first, as they do in
    every step of the engine. Passes of batches of a fixed shape can be replayed from a CUDA graph. Blocks in fp8 are
    read as they are, by the kernels for that; batches with masks cannot have such blocks.

    Where the newest tokens are in full precision, attention to windows and to blocks is computed in two calls and put
    together by log-sum-exp. Not built: graphs for that, and windows beside sliding ones.
    """

    rank: ClassVar[int] = 20
    knows: ClassVar[frozenset[str]] = frozenset({"residual"})
    codecs: ClassVar[frozenset[str]] = frozenset({"plain", "fp8"})

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

    def refuses(self, shape: CacheShape) -> str | None:
        if shape.residual is not None and shape.windows != {None}:
            return "it has no windows in full precision beside sliding ones"
        return super().refuses(shape)

    def prepare(self, shape: CacheShape, report: Reporter = silent) -> None:
        build_kernels(shape, report)

    def open(self, shape: CacheShape) -> PagedCache:
        return FlashInferCache(shape)
