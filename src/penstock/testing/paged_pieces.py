"""Texts whose tokens see their keys in pieces: windows in full precision beside coded blocks, and tokens of some layers
in the places of others; beside attention by its definition, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.core.processor import on_threads
from penstock.core.randomness import torch_generator
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.ops.paged.layered import LayeredTokens
from penstock.ops.paged.residual import Residual
from penstock.testing.paged_scene import Tree, attention, sees

BLOCK, BLOCKS, KV_HEADS, HEADS = 4, 64, 2, 6

#: Windows of 8 tokens; of up to 4 more the places stay as they were.
WINDOWS = Residual(tokens=8, rings=3, tentative=4)

#: Steps of texts: a text, how many of its last tokens are cut off before, and how many come. Prompts within a window
#: and over several, chunks and drafts over their edges, and texts that are cut back into an earlier one.
STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 0, 3), (1, 0, 21)),
    ((0, 0, 1), (1, 0, 1)),
    ((1, 0, 4), (0, 0, 6)),
    ((2, 0, 37), (0, 2, 1), (1, 4, 1)),
    ((0, 0, 14), (2, 0, 1), (1, 0, 1)),
    ((1, 3, 2), (2, 2, 5), (0, 1, 1)),
    ((2, 0, 30), (1, 0, 12), (0, 0, 1)),
    ((0, 0, 1), (1, 0, 1), (2, 0, 1)),
)
#: The cache of so many texts is compressed after so many steps: their windows are counted from there on.
COMPRESSED = {2: 0, 5: 1}


@dataclasses.dataclass
class Text:
    """Its blocks, where its windows are counted from, and what its tokens have of each layer: the keys and values as
    they were computed, and as they come back of the codec, each a list of [2, n, K, D] in float64 by layer."""

    blocks: list[int]
    exact: list[Tensor]
    coded: list[Tensor]
    places: int = 0
    since: int = 0

    def slots(self, first: int, end: int) -> list[int]:
        """Those of its places from ``first`` up to ``end``."""
        return [self.blocks[place // BLOCK] * BLOCK + place % BLOCK for place in range(first, end)]


def check_windows(
    policy: PagedAttention, shape: CacheShape, windows: Sequence[int | None], tolerance: float, threads: int = 1
) -> None:
    """Asserts that tokens read those of their own window in full precision, and all before as the codec of ``shape``
    has them. ``windows`` are the sliding windows of its layers."""
    shape = dataclasses.replace(
        shape, blocks=BLOCKS, block_size=BLOCK, residual=WINDOWS, needs=shape.needs | {"residual"}
    )
    with on_threads(threads):
        _play_windows(policy.open(shape), windows, tolerance)


def _play_windows(cache: PagedCache, windows: Sequence[int | None], tolerance: float) -> None:
    draw, shape = torch_generator(0, "testing/windows"), cache.shape
    texts = _texts(3, shape)
    for number, step in enumerate(STEPS):
        for text, cut, _ in step:
            _cut(texts[text], texts[text].places - cut)
        if number in COMPRESSED:
            texts[COMPRESSED[number]].since = texts[COMPRESSED[number]].places
        members = [texts[text] for text, _, _ in step]
        gains = [gain for _, _, gain in step]
        rings = torch.tensor([(2, 0, 1)[text] for text, _, _ in step], dtype=torch.int32)
        since = torch.tensor([member.since for member in members], dtype=torch.int32)
        cache.plan(dataclasses.replace(_batch(members, gains), rings=rings, since=since))
        for layer, window in enumerate(windows):
            query, key, value = _drawn(sum(gains), shape, draw)
            _note(members, gains, layer, key, value, shape)
            found = cache.attend(layer, query, key, value, scale=0.4, window=window).double().cpu()
            wanted = []
            for member, own in zip(members, torch.split(query.double().cpu(), gains), strict=True):
                seen = sees(member.places, len(own), None, window)
                places = torch.arange(member.places)
                begin = torch.maximum(places - places % WINDOWS.tokens, torch.tensor(member.since))[-len(own) :]
                exact = places >= begin[:, None]
                keys, values = torch.cat([member.coded[layer], member.exact[layer]], 1)
                wanted.append(attention(own, keys, values, torch.cat([seen & ~exact, seen & exact], 1), scale=0.4))
            _compare(found, torch.cat(wanted), tolerance, f"step {number}, layer {layer}")
    if None in windows:
        for looking in texts:
            _check_looks(cache, looking, tolerance)


def check_spans(policy: PagedAttention, shape: CacheShape, tolerance: float, threads: int = 1) -> None:
    """Asserts that each layer sees its own tokens of a cache in which some keep more than others, and those behind
    them, beside a text that was not compressed; with masks, where the cache takes them."""
    view = LayeredTokens(shape.layers, 0.5, 2, 1.9)
    shape = dataclasses.replace(shape, blocks=BLOCKS, block_size=BLOCK, view=view, needs=shape.needs | {"view"})
    with on_threads(threads):
        _play_spans(policy.open(shape), view, tolerance)


def _play_spans(cache: PagedCache, view: LayeredTokens, tolerance: float) -> None:
    draw, shape = torch_generator(0, "testing/spans"), cache.shape
    texts, packed = _texts(3, shape), (41, 0, 18)
    for text, tokens in zip(texts, packed, strict=True):
        size = (2, tokens, shape.kv_heads, shape.head_dim)
        for layer, count in enumerate(view.counts(tokens)):
            own = torch.randn(size, generator=draw, dtype=torch.float64)[:, :count].to(shape.dtype)
            text.coded[layer] = own.double()
        text.places = view.places(tokens) if tokens else 0
        if tokens:
            laid = [view.lay([each[part].transpose(0, 1) for each in text.coded]) for part in (0, 1)]
            slots = torch.tensor(text.slots(0, text.places))
            cache.write(slots, *(each.to(shape.device, shape.dtype) for each in laid))
    tree = Tree((-1, 0, 0, 1, -1))
    steps: list[tuple[list[int], dict[int, Tree]]] = [
        ([9, 30, 1], {}),
        ([1, 1, 1], {}),
        ([5, 2, 1], {0: tree}),
        ([1, 3, 6], {}),
    ]
    for number, (gains, masks) in enumerate(steps):
        parents = None
        if masks:
            of = [masks[each].parents if each in masks else range(-1, gain - 1) for each, gain in enumerate(gains)]
            parents = torch.tensor([parent for each in of for parent in each], dtype=torch.int32)
        shared = torch.tensor(packed, dtype=torch.int32)
        cache.plan(dataclasses.replace(_batch(texts, gains), parents=parents, packed=shared))
        for layer in range(shape.layers):
            query, key, value = _drawn(sum(gains), shape, draw)
            _note(texts, gains, layer, key, value, shape)
            found = cache.attend(layer, query, key, value, scale=0.4, window=None).double().cpu()
            wanted = []
            for each, (text, own) in enumerate(zip(texts, torch.split(query.double().cpu(), gains), strict=True)):
                keys, values = text.coded[layer]
                behind = text.places - (view.places(packed[each]) if packed[each] else 0)
                seen = sees(behind, len(own), masks.get(each), None)
                seen = torch.nn.functional.pad(seen, (len(keys) - behind, 0), value=True)
                wanted.append(attention(own, keys, values, seen, scale=0.4))
            _compare(found, torch.cat(wanted), tolerance, f"step {number}, layer {layer}")
    for text, tokens in zip(texts, packed, strict=True):
        _check_looks(cache, text, tolerance, tokens)


def _check_looks(cache: PagedCache, text: Text, tolerance: float, packed: int = 0) -> None:
    """Asserts that tokens which are told what they look at look at that: at keys as they come back of the codec."""
    shape, count, slots = cache.shape, 5, torch.tensor([text.slots(0, text.places)])
    size, draw = (shape.layers, 1, count, shape.heads, shape.head_dim), torch_generator(0, "testing/looks")
    queries = torch.randn(size, generator=draw, dtype=torch.float64).to(shape.dtype)
    scales = [0.3 + 0.1 * layer for layer in range(shape.layers)]
    found = cache.looks(slice(0, shape.layers), queries.to(shape.device), scales, slots, packed)
    if found is None:
        return
    missing = shape.view.missing(packed) if shape.view is not None and packed else (0,) * shape.layers
    for layer, gone in enumerate(missing):
        keys = text.coded[layer][0]
        # Values that are one for one token each, so that what comes out is what is paid to them.
        groups, ones = shape.heads // shape.kv_heads, torch.eye(len(keys), dtype=torch.float64).unsqueeze(1)
        for head in range(shape.kv_heads):
            own = queries[layer, 0, :, head * groups : (head + 1) * groups].double()
            seen = sees(len(keys), count, None, None)
            paid = attention(own, keys[:, head : head + 1], ones, seen, scale=scales[layer]).mean(1)
            told = found[layer, 0, head].double().cpu()
            assert not told[:, :gone].any(), "something is paid to tokens that are not there"
            # It is told in float32.
            _compare(told[:, gone:], paid, max(tolerance, 1e-7), f"what layer {layer} looks at")


def _texts(count: int, shape: CacheShape) -> list[Text]:
    """Texts without tokens, and room for all that they will have, in blocks that are no neighbours."""
    order = torch.randperm(shape.blocks, generator=torch_generator(0, "testing/blocks")).tolist()
    none = [torch.zeros(2, 0, shape.kv_heads, shape.head_dim, dtype=torch.float64) for _ in range(shape.layers)]
    return [Text(order[number::count], list(none), list(none)) for number in range(count)]


def _cut(text: Text, places: int) -> None:
    text.places = places
    text.exact, text.coded = ([each[:, :places] for each in own] for own in (text.exact, text.coded))


def _batch(texts: Sequence[Text], gains: Sequence[int]) -> PagedBatch:
    """One in which ``texts`` gain so many tokens, whose places are counted as theirs from now on."""
    slots = []
    for text, gain in zip(texts, gains, strict=True):
        slots += text.slots(text.places, text.places + gain)
        text.places += gain
    lengths, tables = (
        torch.tensor(each, dtype=torch.int32)
        for each in ([text.places for text in texts], [text.blocks[: BLOCKS // 3] for text in texts])
    )
    starts = torch.tensor([0, *gains]).cumsum(0).to(torch.int32)
    return PagedBatch(starts, lengths, tables, torch.tensor(slots))


def _drawn(count: int, shape: CacheShape, draw: torch.Generator) -> list[Tensor]:
    """Random query, key and value of so many tokens."""
    drawn = torch.randn(count, shape.heads + 2 * shape.kv_heads, shape.head_dim, generator=draw, dtype=torch.float64)
    own = drawn.to(shape.device, shape.dtype)
    return list(torch.split(own, [shape.heads, shape.kv_heads, shape.kv_heads], 1))


def _note(texts: list[Text], gains: list[int], layer: int, key: Tensor, value: Tensor, shape: CacheShape) -> None:
    """Adds the new tokens to what the texts have."""
    coded, wide = [], torch.promote_types(shape.dtype, torch.float32)
    for part, vectors in enumerate((key, value)):
        table = shape.table(layer, part)
        coded.append(shape.codec.decode(shape.codec.encode(vectors, table), shape.head_dim, wide, table))
    for kept, new in (("exact", torch.stack([key, value])), ("coded", torch.stack(coded))):
        for text, own in zip(texts, torch.split(new.double().cpu(), gains, 1), strict=True):
            getattr(text, kept)[layer] = torch.cat([getattr(text, kept)[layer], own], 1)


def _compare(found: Tensor, wanted: Tensor, tolerance: float, where: str) -> None:
    error = (found - wanted).square().mean().sqrt()
    assert error <= tolerance, f"an error of {error:.2e} in {where}"


def shape_in(dtype: torch.dtype, device: torch.device, layers: int, head_dim: int, codec: Codec) -> CacheShape:
    """What texts are kept in, but for the number of blocks."""
    return CacheShape(layers, HEADS, KV_HEADS, head_dim, 1, BLOCK, dtype, device, codec=codec)
