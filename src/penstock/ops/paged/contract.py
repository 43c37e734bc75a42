"""The contract ``attention.paged``: attention of a flat batch of tokens over keys and values in blocks of a pool.

A pool has blocks of ``block_size`` token slots. A sequence's *table* lists its blocks in order: the keys and values of
its token at position p are in slot p % block_size of block table[p // block_size]. Blocks may be shared by sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.progress import Reporter, silent
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.codecs.plain import Plain
from penstock.ops.paged.contexts import Contexts, attend_beside
from penstock.ops.paged.masks import Masks, masks_of
from penstock.ops.paged.residual import Residual
from penstock.ops.paged.selection import BlockSelection
from penstock.ops.paged.view import Fetch, View
from penstock.ops.paged.weighed import Weighed, shares
from penstock.policy import Policy, contract

if TYPE_CHECKING:
    from penstock.ops.paged.aside import Aside
    from penstock.ops.paged.watch import Watch


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What the memory of keys and values is made of.

    Attributes:
        layers, heads, kv_heads, head_dim: of the model.
        blocks: how many blocks the pool has.
        block_size: token slots of a block.
        dtype: of queries, keys and values.
        device: of the memory.
        windows: the sliding windows that the layers have; None is none.
        latent: how many of a key's first numbers are its value, of which nothing else is kept; None where values are
            their own.
        needs: what attention has to do besides: "cap", "sinks" or "chunk", as of
            :class:`~penstock.ops.attention.Extras`, "latent", "view", "selection", "contexts", "weighed" or
            "residual".
        view: how attention sees caches that were compressed as a whole; None where each place has a token always. The
            ``needs`` have "view" too.
        selection: what tokens read that select; None where all read all. The ``needs`` have "selection" too.
        codec: how keys and values lie in the memory.
        residual: the windows of sequences that are in full precision besides; None where there are none. The ``needs``
            have "residual" too.
        learned: the codec's tables, [layers, 2, K, ...], of keys and of values (of a latent cache
            [layers, 1, 1, ...]),
            None where it learns none.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    windows: frozenset[int | None] = frozenset({None})
    latent: int | None = None
    needs: frozenset[str] = frozenset()
    view: View | None = None
    selection: BlockSelection | None = None
    codec: Codec = dataclasses.field(default_factory=Plain)
    residual: Residual | None = None
    learned: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def parts(self) -> int:
        """How many vectors there are for a token and KV head: a key and a value, or a key alone."""
        return 2 if self.latent is None else 1

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes in all layers."""
        vectors = self.parts * self.layers * self.block_size * self.kv_heads
        return vectors * self.codec.vector_bytes(self.head_dim, self.dtype)

    @property
    def residual_bytes(self) -> int:
        """Bytes that the windows in full precision take, whatever the number of blocks."""
        if self.residual is None:
            return 0
        vectors = self.parts * self.layers * self.residual.rings * self.residual.places * self.kv_heads
        return vectors * self.head_dim * self.dtype.itemsize

    @property
    def aside_bytes(self) -> int:
        """Bytes that a block has in the host's memory besides, for what its view moves there."""
        if self.view is None:
            return 0
        each = self.layers * self.kv_heads * self.codec.vector_bytes(self.head_dim, self.dtype)
        return self.view.aside(self.block_size) * each

    def table(self, layer: int, part: int) -> Tensor | None:
        """What was learned of the keys (0) or the values (1) of ``layer``."""
        return None if self.learned is None else self.learned[layer, part]


#: What :attr:`CacheShape.needs` may have, in words.
NEEDS = {
    "cap": "soft-capped scores",
    "sinks": "attention sinks",
    "chunk": "chunked attention",
    "latent": "latent attention",
    "view": "views of compressed caches",
    "selection": "block top-k attention",
    "contexts": "contexts beside a text",
    "weighed": "attention that is weighed by the parts of a text",
    "residual": "windows in full precision",
}

#: Of a cache.
ALL_LAYERS = slice(None)


class StepShape(NamedTuple):
    """What batches have in common whose passes can be replayed from one CUDA graph.

    Attributes:
        singles: sequences with one new token each, which come first.
        others: sequences behind them.
        tokens: new tokens of those.
        masked: over how many new tokens of a sequence a mask may be, as of
            :class:`~penstock.ops.paged.masks.Masks`; 0 where none has one.
        onward: how many passes may follow that of the plan, each of which goes on with the next token of the sequences
            (:meth:`PagedCache.advance`).
    """

    singles: int
    others: int = 0
    tokens: int = 0
    masked: int = 0
    onward: int = 0

    @property
    def rows(self) -> int:
        """New tokens in all."""
        return self.singles + self.tokens

    def fits(self, shape: StepShape) -> bool:
        """Whether sequences with at least one new token each can make a batch of this shape one of ``shape``."""
        others, tokens = shape.others - self.others, shape.tokens - self.tokens
        room = self.singles <= shape.singles and 0 <= others <= tokens and (others > 0 or tokens == 0)
        return room and self.masked <= shape.masked


@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of a flat batch belong. Sequence b's new tokens are [starts[b], starts[b + 1]); they are the
    last of its ``lengths[b]`` tokens. Each sees those before it and itself, unless ``parents`` or ``open`` say
    otherwise for its sequence; a sequence has one or the other.

    All tensors lie on the CPU, contiguous: a backend moves what it needs.

    Attributes:
        starts: int32 [B + 1], from 0 to N.
        lengths: int32 [B], tokens of each sequence with the new ones.
        tables: int32 [B, M], the blocks of each sequence; what is behind its last block is not looked at.
        slots: int64 [N], block * block_size + offset, where each new token's key and value go.
        parents: int32 [N], for trees: the place, among its own sequence's new tokens, of the token before each new one;
            -1 where that is the last one in the cache. A token sees what was in the cache, its ancestors and itself.
            None is places in a row.
        open: int32 [B], for masked blocks: so many of the last new tokens of each sequence see each other whatever
            their order, besides all that is before them. None is 0 everywhere.
        shape: that the batch was given for a plan that was made to be replayed; see :meth:`PagedCache.fix`.
        packed: int32 [B], how many tokens share the first places of each sequence, as the :attr:`CacheShape.view` has
            it; ``lengths`` counts places. None is 0 everywhere.
        given: int32 [B], from which place on the tokens of each sequence select, as the :attr:`CacheShape.selection`
            has it; None where none do. Tokens of such a batch are in a row.
        watched: int64 [N], where the cache's :class:`~penstock.ops.paged.watch.Watch` keeps the query of each new
            token; None where it keeps none of them.
        contexts: what some of the sequences see beside their own tokens, of a cache whose needs have "contexts". Such
            a sequence has no mask.
        weighed: tokens of whose attention is asked where it goes, of a cache whose needs have "weighed".
        rings: int32 [B], where the window of each sequence lies, of a cache whose needs have "residual", see
            :mod:`penstock.ops.paged.residual`. None where all is read as it is coded. Tokens of such a batch are in a
            row.
        since: int32 [B], from which place on the windows of each sequence are counted; with ``rings``.
    """

    starts: Tensor
    lengths: Tensor
    tables: Tensor
    slots: Tensor
    parents: Tensor | None = None
    open: Tensor | None = None
    shape: StepShape | None = None
    watched: Tensor | None = None
    packed: Tensor | None = None
    given: Tensor | None = None
    contexts: tuple[Contexts, ...] = ()
    weighed: tuple[Weighed, ...] = ()
    rings: Tensor | None = None
    since: Tensor | None = None

    @functools.cached_property
    def masks(self) -> Masks | None:
        """The masks of those sequences that are not causal; None where all are.

        Raises:
            ValueError: ``parents`` or ``open`` contradict themselves or the batch.
        """
        if self.parents is None and self.open is None:
            return None
        given = (None if each is None else each.numpy() for each in (self.parents, self.open))
        found = masks_of(self.starts.numpy(), self.lengths.numpy(), *given)
        return found if len(found.sequences) else None

    @functools.cached_property
    def own_shape(self) -> StepShape:
        """That of the batch as it is."""
        several = np.flatnonzero(np.diff(self.starts.numpy()) > 1)
        count, masked = len(self.lengths), 0 if self.masks is None else int(self.masks.counts.max())
        singles = int(several[0]) if several.size else count
        return StepShape(singles, count - singles, len(self.slots) - singles, masked)


def slots_onward(tables: Tensor, places: Tensor, more: Tensor, size: int, nowhere: int) -> Tensor:
    """int64 [B], the slots of new tokens at these ``places``, as of :meth:`PagedCache.advance`, in sequences whose
    blocks of ``size`` tokens are in ``tables`` int32 [B, W]; ``nowhere`` for those that stay where they are."""
    block = tables.gather(1, (places // size).unsqueeze(1)).squeeze(1).long()
    return torch.where(more, block * size + places % size, nowhere)


class PagedCache:
    """The memory of keys and values, and attention over it.

    Attributes:
        watch: keeps queries, where somebody wants to know what they look at.
        aside: what the view of compressed caches has in the host's memory.
    """

    watch: Watch | None = None
    aside: Aside | None = None

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.allocate()

    def allocate(self) -> None:
        """Takes memory for :attr:`shape`, and lets go of what there was before."""
        raise NotImplementedError

    def resize(self, blocks: int) -> None:
        """Gives the pool so many blocks; what it held is lost, and graphs that were captured with it are void. What
        :meth:`fix` fixed stays.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the memory is not there.
        """
        self.shape = dataclasses.replace(self.shape, blocks=blocks)
        self.allocate()

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        """Prepares the attention of ``batch`` in all layers; called once before each forward pass. What is attended to
        after it belongs to this batch.

        Batches that a device computes at the same time are planned in lanes of their own, on the streams that compute
        them. Where passes run one after the other, there is no need to tell lanes apart.

        A backend extends this."""
        if self.watch is not None:
            self.watch.plan(batch, lane)

    @property
    def recorded(self) -> Hashable | None:
        """Where attention for the planned batch is nothing but native calls: something that is the same for all batches
        for which these are the same; else None."""
        return None

    def note(self, layer: int, query: Tensor, scale: float) -> None:
        """A backend is about to attend for ``query`` in ``layer``."""
        if self.watch is not None:
            self.watch.note(layer, query, scale)

    def fix(self, shapes: list[StepShape], pages: int) -> bool:
        """Makes plans of batches that name one of these ``shapes``, in lane 0, touch the same memory each time, so that
        a captured CUDA graph of the pass can be replayed after a plan; False where that cannot be had. ``pages`` is the
        most blocks of a sequence. A shape that is fixed already stays as it is."""
        return False

    @property
    def advances(self) -> bool:
        """Whether batches can :meth:`advance` that name no fixed shape."""
        return False

    def advance(self, places: Tensor, more: Tensor, nowhere: int) -> None:
        """Takes the batch that was planned, of one token a sequence, to the next token of each: one of a fixed shape
        that goes :attr:`onward <StepShape.onward>`, as a part of a pass, which may be captured and replayed; or any, if
        the cache :attr:`advances`. The planned batch itself may be changed.

        Args:
            places: int64 [B], of the new tokens in their sequences, on the device.
            more: bool [B], which sequences have come to these. The others stay where they are; what is computed of them
                is of no meaning, and their keys and values go to the slot ``nowhere``.
            nowhere: belongs to nobody.
        """
        raise NotImplementedError

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
        """Stores the new tokens' keys and values of ``layer``, then attends: query [N, H, D], key and value
        [N, K, D], result [N, H, D]; of a latent cache, value and result have as many numbers as that says. A ``window``
        lets a token see itself and, of those that it would see, the ones less than ``window`` positions away. A token's
        position is its place in the sequence; in a tree, it is one more than that of the token before it. There are
        only such ``extras`` as are among the needs of the cache."""
        raise NotImplementedError

    def looks(
        self, layers: slice, queries: Tensor, scales: Sequence[float], slots: Tensor, packed: int = 0
    ) -> Tensor | None:
        """How much of their attention tokens that were computed already pay to each token of their caches: float32
        [layers, S, K, q, n], averaged over the query heads of a key head. None where the backend has no kernel that
        tells it; it is computed of what :meth:`read` gives then, as in
        :func:`~penstock.serve.kv.compaction.attention`.

        Args:
            layers: of the cache.
            queries: [layers, S, q, H, D] of the last q tokens of S texts.
            scales: of each of the layers, the factor on scores.
            slots: int64 [S, m], the places of the texts in order, from the first one on.
            packed: how many tokens share the first of them. The n tokens are in the order of :meth:`View.restored`.
        """
        return None

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole blocks in all layers, sources[i] to targets[i]. All are read before any is written: a block
        that was copied and then let go of may be a target too. No target comes twice."""
        raise NotImplementedError

    def see_contexts(self, batch: PagedBatch, layer: int, query: Tensor, out: Tensor, scale: float) -> None:
        """Puts attention to the text and to the contexts beside it in place of attention to the text alone, in the rows
        of ``out`` [N, H, D] whose tokens see any. A backend that knows "contexts" calls this once the keys and values
        of ``batch`` are stored."""
        for contexts in batch.contexts:
            start, end = batch.starts[contexts.sequence : contexts.sequence + 2].tolist()
            length = int(batch.lengths[contexts.sequence])
            first = max(contexts.after, length - (end - start))
            rows, own = slice(end - (length - first), end), self._slots(batch, contexts.sequence, length)
            slots = torch.cat([own, contexts.slots])
            keys, values = (each[0].transpose(0, 1) for each in self.read(slots, slice(layer, layer + 1)))
            out[rows] = attend_beside(query[rows], keys, values, contexts, scale=scale, first=first, own=length)

    def weigh(
        self, batch: PagedBatch, layer: int, query: Tensor, scale: float, window: int | None, extras: Extras
    ) -> None:
        """Adds to what is :attr:`PagedBatch.weighed` what ``layer`` has of it. A backend that knows "weighed" calls
        this once the keys of ``batch`` are stored."""
        for each in batch.weighed:
            behind = int(batch.starts[each.sequence + 1]) - int(batch.lengths[each.sequence])
            slots = self._slots(batch, each.sequence, each.last)
            keys = self.read(slots, slice(layer, layer + 1))[0][0].transpose(0, 1)
            own = query[behind + each.first : behind + each.last]
            each.add(shares(own, keys, each, scale, window, extras) / self.shape.layers)

    def _slots(self, batch: PagedBatch, sequence: int, count: int) -> Tensor:
        """Where the first ``count`` tokens of a ``sequence`` of ``batch`` are."""
        places, size = torch.arange(count), self.shape.block_size
        return batch.tables[sequence].long()[places // size] * size + places % size

    def fetch(self, slots: Tensor) -> Fetch | None:
        """What gives the vectors in the host's memory of a sequence whose places are in ``slots``; None where there are
        none."""
        return None if self.aside is None else functools.partial(self.aside.read, slots)

    def codes(self, slots: Tensor, layers: slice = ALL_LAYERS) -> list[Tensor]:
        """The keys and the values of the tokens in ``slots`` int64 [n], on any device, as in :attr:`PagedBatch.slots`,
        as the codec stores them: [layers, K, n, m] each; of a latent cache, the keys alone."""
        raise NotImplementedError

    def put(self, slots: Tensor, codes: Sequence[Tensor]) -> None:
        """Puts ``codes``, as :meth:`codes` gives them, in place of those in ``slots``, none of which comes twice."""
        raise NotImplementedError

    def read(self, slots: Tensor, layers: slice = ALL_LAYERS) -> tuple[Tensor, Tensor]:
        """The keys and values [layers, K, n, D] of the tokens in ``slots``, decoded. Of a latent cache, the values are
        the first numbers of the keys."""
        shape, found, numbers = self.shape, [], range(self.shape.layers)[layers]
        for part, codes in enumerate(self.codes(slots, layers)):
            vectors = [
                shape.codec.decode(own.transpose(0, 1), shape.head_dim, shape.dtype, shape.table(layer, part))
                for layer, own in zip(numbers, codes, strict=True)
            ]
            found.append(torch.stack(vectors).transpose(1, 2))
        return found[0], found[-1][..., : shape.latent]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts ``keys`` and ``values``, as :meth:`read` gives them, in place of those in ``slots``, none of which comes
        twice. They are coded anew: what only changes its place is better moved as :meth:`codes`."""
        given = (keys, values)[: self.shape.parts]
        self.put(slots, [self.encoded(vectors, part) for part, vectors in enumerate(given)])

    def encoded(self, vectors: Tensor, part: int) -> Tensor:
        """Keys (0) or values (1), as :meth:`read` gives them, as :meth:`codes` does."""
        encode, table = self.shape.codec.encode, self.shape.table
        layers = [encode(own.transpose(0, 1), table(layer, part)) for layer, own in enumerate(vectors)]
        return torch.stack(layers).transpose(1, 2)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies the keys and values of single tokens in all layers, from the slots ``sources[i]`` to ``targets[i]``,
        int64 [n] on any device. All are read before any is written. No target comes twice."""
        self.put(targets, self.codes(sources))


@contract(
    "attention.paged",
    law="equal to plain attention over each sequence's own tokens, for any lengths, block tables, shared blocks and "
    "masks; writes go to the slots of the new tokens and nowhere else",
)
class PagedAttention(Policy):
    """Makes the memory of keys and values, and computes attention over it."""

    #: Of those that serve a device, the one with the highest is taken where none is named.
    rank: ClassVar[int] = 0

    #: What it can do of :attr:`CacheShape.needs`.
    knows: ClassVar[frozenset[str]] = frozenset()

    #: The codecs whose blocks it can read, by name.
    codecs: ClassVar[frozenset[str]] = frozenset({"plain"})

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None where the policy works for these on this machine, else the reason why it does not, as a clause:
        ``"it needs a CUDA device"``."""
        raise NotImplementedError

    def lacks(self, needs: frozenset[str]) -> str | None:
        """None where it :attr:`knows` all of a cache's needs, else what it does not, as a clause."""
        missing = [name for name in NEEDS if name in needs - self.knows]
        return f"it has no {' and no '.join(NEEDS[name] for name in missing)}" if missing else None

    def reads(self, codec: Codec) -> str | None:
        """None where it computes attention over blocks of the ``codec``, else why not, as a clause."""
        return None if codec.policy_name in self.codecs else f"it cannot read blocks in {codec.policy_name}"

    def refuses(self, shape: CacheShape) -> str | None:
        """None where it can open a cache of this shape on this machine, else why not, as a clause."""
        return (
            self.serves(shape.device, shape.dtype, shape.head_dim) or self.lacks(shape.needs) or self.reads(shape.codec)
        )

    def prepare(self, shape: CacheShape, report: Reporter = silent) -> None:
        """Builds what :meth:`open` and passes over its cache would build at their first use on a machine, where that
        takes long, and reports it; the number of blocks does not matter. What is built is kept for later starts.

        Raises:
            PenstockError: something cannot be built.
        """

    def open(self, shape: CacheShape) -> PagedCache:
        """The memory, for a shape that the policy serves.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the memory is not there.
        """
        raise NotImplementedError
