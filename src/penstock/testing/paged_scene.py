"""What sequences on a paged memory of keys and values go through, and what they should see.

A :class:`Scene` plays a script of steps, forks and releases on a memory, as an engine would, and keeps every sequence's
own keys and values beside it in float64. After each step it compares what the memory gives with plain softmax
attention over that record. Blocks are dealt out in a scrambled order, and hold another sequence's values from before.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch


@dataclasses.dataclass(frozen=True)
class Tree:
    """The new tokens of a sequence branch: of each, the place of the one before it among them, or -1."""

    parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Open:
    """The last ``count`` new tokens of a sequence see each other."""

    count: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward pass: pairs of a sequence, by a number that may be new, and how many tokens it gains; and pairs of
    those sequences and what they have of masks."""

    gains: tuple[tuple[int, int], ...]
    masks: tuple[tuple[int, Tree | Open], ...] = ()


@dataclasses.dataclass(frozen=True)
class Keep:
    """Of the tokens that the sequence gained last, those in ``path`` (places, ascending) move up to follow what was
    before them, and the others are forgotten, as when a path through a tree is accepted."""

    sequence: int
    path: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fork:
    """Sequence ``target`` begins as a copy of ``source``: it shares the full blocks and copies the last one."""

    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Release:
    """The sequence ends; its blocks, where no other has them, are dealt out again."""

    sequence: int


@dataclasses.dataclass(frozen=True)
class Compact:
    """Of the tokens of ``sequence``, each head of each layer keeps as many as ``kept`` are, and others than the next
    head: those in the places ``kept``, plus the number of the head and of the layer, modulo the length."""

    sequence: int
    kept: tuple[int, ...]


Action = Step | Fork | Release | Keep | Compact


@dataclasses.dataclass
class _Sequence:
    """Its blocks, its keys and values so far: float64 [layers, 2, length, K, D], and how many it gained last."""

    blocks: list[int]
    record: Tensor
    gained: int = 0

    @property
    def length(self) -> int:
        return self.record.shape[2]


class Scene:
    """Sequences on one memory, and the record of what they should see.

    Args:
        policy: what is tested; it serves the shape.
        shape: the memory; ``blocks`` must suffice for the script.
        windows: the sliding window of each layer, or None; ``shape.windows`` has them too.
        seed: of all random values, and of the order of blocks.
        stale: what every slot holds before the script begins. A policy must not let it through, not even NaN.
        tolerance: of the error's root mean square; values are drawn with variance 1.
        extras: what the attention of all layers does besides; ``shape.needs`` has it too.
    """

    def __init__(
        self,
        policy: PagedAttention,
        shape: CacheShape,
        windows: tuple[int | None, ...],
        *,
        seed: int = 0,
        stale: float = math.nan,
        tolerance: float,
        extras: Extras = PLAIN,
    ) -> None:
        self.shape, self.windows, self.tolerance, self.extras = shape, windows, tolerance, extras
        self._cache = policy.open(shape)
        self._draw = torch_generator(seed, "testing/paged_scene")
        self._free = torch.randperm(shape.blocks, generator=self._draw).tolist()
        self._holders = [0] * shape.blocks
        self._live: dict[int, _Sequence] = {}
        self._fill(stale)

    def play(self, script: tuple[Action, ...]) -> None:
        """Plays a script, then lets each sequence that is left gain a token, so that all of its memory is read."""
        for action in script:
            match action:
                case Step(gains, masks):
                    self._step(gains, dict(masks))
                case Fork(source, target):
                    self._fork(source, target)
                case Release(sequence):
                    self._release(self._live.pop(sequence).blocks)
                case Keep(sequence, path):
                    self._keep(self._live[sequence], path)
                case Compact(sequence, kept):
                    self._compact(self._live[sequence], kept)
        for number in self._live:
            self._step(((number, 1),), {})

    def _fill(self, stale: float) -> None:
        """Writes ``stale`` to every slot, by short sequences that together take the whole pool."""
        shape = self.shape
        blocks = torch.arange(shape.blocks, dtype=torch.int32)
        tables = torch.nn.functional.pad(blocks, (0, -shape.blocks % 8)).view(-1, 8)
        count = shape.blocks * shape.block_size
        starts = (torch.arange(len(tables) + 1) * 8 * shape.block_size).clamp(max=count).to(torch.int32)
        self._cache.plan(PagedBatch(starts, starts.diff(), tables, torch.arange(count)))
        for layer, window in enumerate(self.windows):
            query, key, value = (
                torch.full((count, heads, shape.head_dim), stale, dtype=shape.dtype, device=shape.device)
                for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
            )
            value = value[..., : shape.latent]
            self._cache.attend(layer, query, key, value, scale=1.0, window=window, extras=self.extras)

    def _fork(self, source: int, target: int) -> None:
        original = self._live[source]
        blocks = list(original.blocks)
        if original.length % self.shape.block_size:
            blocks[-1] = self._free.pop()
            self._cache.copy([original.blocks[-1]], [blocks[-1]])
        for block in blocks:
            self._holders[block] += 1
        self._live[target] = _Sequence(blocks, original.record.clone())

    def _keep(self, sequence: _Sequence, path: tuple[int, ...]) -> None:
        before = sequence.length - sequence.gained
        sources, targets = (
            [self._slot(sequence, before + place) for place in places] for places in (path, range(len(path)))
        )
        self._cache.move(torch.tensor(sources), torch.tensor(targets))
        record = sequence.record
        sequence.record = torch.cat([record[:, :, :before], record[:, :, [before + place for place in path]]], 2)
        count = -(-sequence.length // self.shape.block_size)
        self._release(sequence.blocks[count:])
        del sequence.blocks[count:]

    def _compact(self, sequence: _Sequence, kept: tuple[int, ...]) -> None:
        """Each layer and head keeps other tokens: their places are ``kept``, shifted by one for each head and layer."""
        shape, length = self.shape, sequence.length
        slots = torch.tensor([self._slot(sequence, place) for place in range(length)])
        keys, values = self._cache.read(slots)
        for got, part in ((keys, 0), (values, 1 if shape.latent is None else 0)):
            wanted = sequence.record[:, part].transpose(1, 2)[..., : got.shape[-1]].to(shape.dtype)
            assert torch.equal(got.cpu(), wanted), "what is read is not what was stored"
        shift = torch.arange(shape.layers)[:, None, None] + torch.arange(shape.kv_heads)[:, None]
        index = (torch.tensor(kept) + shift) % length
        record = sequence.record.gather(
            2, index.transpose(1, 2)[:, None, :, :, None].expand(-1, 2, -1, -1, shape.head_dim)
        )
        own = index[..., None].to(keys.device)
        codes = [part.take_along_dim(own, 2) for part in self._cache.codes(slots)]
        if shape.codec.policy_name == "plain":
            self._cache.write(slots[: len(kept)], keys.take_along_dim(own, 2), values.take_along_dim(own, 2))
        else:  # what is coded twice need not be what was coded once
            self._cache.put(slots[: len(kept)], codes)
        sequence.record = record
        count = -(-sequence.length // shape.block_size)
        self._release(sequence.blocks[count:])
        del sequence.blocks[count:]

    def _slot(self, sequence: _Sequence, place: int) -> int:
        return sequence.blocks[place // self.shape.block_size] * self.shape.block_size + place % self.shape.block_size

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                at = int(torch.randint(len(self._free) + 1, (), generator=self._draw))
                self._free.insert(at, block)

    def _step(self, gains: tuple[tuple[int, int], ...], masks: dict[int, Tree | Open]) -> None:
        shape, size = self.shape, self.shape.block_size
        slots: list[int] = []
        for number, gain in gains:
            if number not in self._live:
                empty = torch.empty(shape.layers, 2, 0, shape.kv_heads, shape.head_dim, dtype=torch.float64)
                self._live[number] = _Sequence([], empty)
            sequence = self._live[number]
            after = sequence.length + gain
            while len(sequence.blocks) * size < after:
                sequence.blocks.append(self._free.pop())
                self._holders[sequence.blocks[-1]] += 1
            slots += [self._slot(sequence, place) for place in range(sequence.length, after)]
            sequence.gained = gain
        members, counts = [self._live[number] for number, _ in gains], [gain for _, gain in gains]
        own_masks = [masks.get(number) for number, _ in gains]
        self._cache.plan(self._batch(members, own_masks, slots))
        lengths = [(member.length, count) for member, count in zip(members, counts, strict=True)]
        new = [self._tokens(len(slots)) for _ in range(shape.layers)]
        rows = torch.stack([self._kept(layer, key, value) for layer, (_, key, value) in enumerate(new)])
        for member, own in zip(members, torch.split(rows, counts, 2), strict=True):
            member.record = torch.cat([member.record, own], 2)
        for layer, (query, key, value) in enumerate(new):
            scale, window = 0.7 * shape.head_dim**-0.5, self.windows[layer]
            kept = value if shape.latent is None else key[..., : shape.latent]
            got = self._cache.attend(layer, query, key, kept, scale=scale, window=window, extras=self.extras)
            assert got.shape == (*query.shape[:-1], kept.shape[-1]) and got.dtype == query.dtype
            wanted = [
                attention(
                    own,
                    member.record[layer, 0],
                    member.record[layer, 1 if shape.latent is None else 0, ..., : shape.latent],
                    sees(member.length, len(own), mask, window, self.extras.chunk),
                    scale=scale,
                    extras=self.extras,
                )
                for own, member, mask in zip(torch.split(query.double().cpu(), counts), members, own_masks, strict=True)
            ]
            where = f"layer {layer}, (length before, new tokens) = {lengths}, masks = {own_masks}"
            self._compare(got, torch.cat(wanted), where)

    def _batch(self, members: list[_Sequence], masks: list[Tree | Open | None], slots: list[int]) -> PagedBatch:
        """Tables are as wide as the longest and one more; what is behind a sequence's last block is nonsense."""
        gains = [member.gained for member in members]
        starts = torch.tensor([0, *gains]).cumsum(0)
        lengths = [member.length + member.gained for member in members]
        tables = torch.full((len(members), max(len(m.blocks) for m in members) + 1), 2**30, dtype=torch.int32)
        for row, member in zip(tables, members, strict=True):
            row[: len(member.blocks)] = torch.tensor(member.blocks, dtype=torch.int32)
        parents, opened = None, None
        if any(isinstance(mask, Tree) for mask in masks):
            of = [
                mask.parents if isinstance(mask, Tree) else range(-1, gain - 1)
                for mask, gain in zip(masks, gains, strict=True)
            ]
            parents = torch.tensor([parent for each in of for parent in each], dtype=torch.int32)
        if any(isinstance(mask, Open) for mask in masks):
            opened = torch.tensor([mask.count if isinstance(mask, Open) else 0 for mask in masks], dtype=torch.int32)
        return PagedBatch(
            starts.to(torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            tables,
            torch.tensor(slots),
            parents,
            opened,
        )

    def _kept(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """What a token sees of new keys and values in the memory's codec: float64 [2, N, K, D]."""
        shape, wide = self.shape, torch.promote_types(self.shape.dtype, torch.float32)
        kept = []
        for part, vectors in enumerate((key, value)):
            table = shape.table(layer, min(part, shape.parts - 1))
            stored = shape.codec.encode(vectors, table)
            kept.append(shape.codec.decode(stored, shape.head_dim, wide, table).double().cpu())
        return torch.stack(kept)

    def _tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value of ``count`` tokens: views of one tensor, as a model's projection gives them, or,
        where the count is odd, with the tokens of a head side by side."""
        shape = self.shape
        heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        drawn = torch.randn(count, sum(heads), shape.head_dim, generator=self._draw, dtype=torch.float64)
        if count % 2:
            drawn = drawn.transpose(0, 1).contiguous().transpose(0, 1)
        query, key, value = torch.split(drawn.to(shape.device, shape.dtype), heads, 1)
        return query, key, value

    def _compare(self, got: Tensor, wanted: Tensor, where: str) -> None:
        error = (got.double().cpu() - wanted).square().mean().sqrt()
        assert error <= self.tolerance, f"an error of {error:.2e} in {where}"


def sees(length: int, new: int, mask: Tree | Open | None, window: int | None, chunk: int | None = None) -> Tensor:
    """Which of the ``length`` tokens of a sequence each of its ``new`` last ones sees, by the definition: bool
    [new, length]."""
    before = length - new
    chains = [[*range(token + 1)] for token in range(new)]
    if isinstance(mask, Tree):
        for token, parent in enumerate(mask.parents):
            chains[token] = [*(chains[parent] if parent >= 0 else []), token]
    position = torch.tensor([*range(before), *(before + len(chain) - 1 for chain in chains)])
    if isinstance(mask, Open):
        chains[new - mask.count :] = [[*range(new)]] * mask.count
    seen = torch.zeros(new, length, dtype=torch.bool)
    for token, chain in enumerate(chains):
        others = torch.tensor([*range(before), *(before + place for place in chain)])
        distance = (position[before + token] - position[others]).abs()
        seen[token, others] = distance < (length if window is None else window)
        if chunk is not None:
            seen[token, others] &= position[before + token] // chunk == position[others] // chunk
    return seen


def attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scale: float, extras: Extras = PLAIN
) -> Tensor:
    """Attention by its definition: the queries [n, H, D] over the tokens key and value [T, K, D] that are ``seen``
    (bool [n, T])."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    if extras.cap is not None:
        scores = extras.cap * (scores / extras.cap).tanh()
    scores = scores.masked_fill(~seen, -math.inf)
    if extras.sinks is not None:  # a key more, whose value is nothing
        sinks = extras.sinks.to(scores).view(-1, 1, 1).expand(-1, len(query), 1)
        scores, value = torch.cat([scores, sinks], 2), torch.cat([value, torch.zeros_like(value[:1])])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """The same where the queries are of the last n of the tokens, and causal."""
    own = torch.arange(len(key) - len(query), len(key)).unsqueeze(1)
    other = torch.arange(len(key)).unsqueeze(0)
    seen = other <= own if window is None else (other <= own) & (other > own - window)
    return attention(query, key, value, seen, scale=scale)
