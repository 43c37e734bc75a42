"""The oracle for caches that are compressed: one sequence, whose keys and values are lists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.selection import BlockSelection
from penstock.ops.paged.view import Packed, View
from penstock.serve.kv.policies.contract import Cached, CachePolicy, Kept
from penstock.testing.paged_scene import attention as attended


@dataclasses.dataclass
class KeptRows:
    """An attention context for pieces of one sequence, whose keys and values are kept in lists by layer: float64
    [K, n, D] each.

    Attributes:
        positions: int64 [T], of the piece.
        keys, values: by layer, of the tokens that are not packed.
        queries: of all tokens so far, by layer, float64 [N, H, D].
        scale: of the scores.
        view, packed: what is left of the first tokens, and how they are seen, where some are packed.
        selection, given: what tokens behind the ``given`` ones read, where they do not read all.
        coded: what comes back of vectors [n, K, D] of a layer, of keys (0) or values (1), where they are coded; those
            in ``keys`` and ``values`` have been. Where some are packed, it is the same for all layers.
        window: so many places make a window in full precision, counted from the last compression at place ``since``;
            0 is none. Of the places since then, ``exact`` has by layer the keys and the values as they were computed.
    """

    positions: Tensor
    keys: list[Tensor] = dataclasses.field(default_factory=list)
    values: list[Tensor] = dataclasses.field(default_factory=list)
    queries: list[Tensor] = dataclasses.field(default_factory=list)
    scale: float = 0.0
    keeps: bool = True
    view: View | None = None
    packed: Packed | None = None
    selection: BlockSelection | None = None
    given: int = 0
    coded: Callable[[int, int, Tensor], Tensor] | None = None
    window: int = 0
    since: int = 0
    exact: list[list[Tensor]] = dataclasses.field(default_factory=list)

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
        assert window is None and extras.none
        given = [key, value]
        if self.coded is not None:
            given = [self.coded(layer, part, each) for part, each in enumerate(given)]
        new = [each.double().transpose(0, 1) for each in given]
        if layer == len(self.keys):
            self.keys.append(new[0][:, :0])
            self.values.append(new[1][:, :0])
            self.queries.append(query.double()[:0])
        self.keys[layer], self.values[layer] = (
            torch.cat([old, own], 1) for old, own in zip((self.keys[layer], self.values[layer]), new, strict=True)
        )
        self.queries[layer], self.scale = torch.cat([self.queries[layer], query.double()]), scale
        length = self.keys[layer].shape[1]
        if self.window:
            return self._attend_window(layer, query, [key.double(), value.double()])
        seen = torch.ones(len(query), length, dtype=torch.bool).tril(length - len(query))
        rows = (self.keys[layer].transpose(0, 1), self.values[layer].transpose(0, 1))
        if self.packed is not None:
            return self._attend_packed(layer, query, *rows, seen)
        if self.selection is not None:
            return self._attend_selected(self.selection, query.double(), *rows, seen, scale).to(query.dtype)
        return attended(query.double(), *rows, seen, scale=scale).to(query.dtype)

    def _attend_window(self, layer: int, query: Tensor, new: list[Tensor]) -> Tensor:
        """Query by query, with the tokens of its own window as they were computed, to which come those that are ``new``
        [T, K, D]."""
        if layer == len(self.exact):
            self.exact.append([each[:0] for each in new])
        self.exact[layer] = [torch.cat(pair) for pair in zip(self.exact[layer], new, strict=True)]
        length, found = self.keys[layer].shape[1], []
        for row, place in zip(query, range(length - len(query), length), strict=True):
            begin = max(self.since, place // self.window * self.window)
            own = slice(begin - self.since, place + 1 - self.since)
            keys, values = (
                torch.cat([each[layer].transpose(0, 1)[:begin], exact[own]])
                for each, exact in zip((self.keys, self.values), self.exact[layer], strict=True)
            )
            all_of_it = torch.ones(1, place + 1, dtype=torch.bool)
            found.append(attended(row.double().unsqueeze(0), keys, values, all_of_it, scale=self.scale))
        return torch.cat(found).to(query.dtype)

    def keep(self, layer: int, kept: Kept) -> None:
        """Of ``layer``, what is ``kept`` is in place of what there was, coded anew."""
        both = [each.transpose(0, 1) for each in (kept.keys, kept.values)]
        if self.coded is not None:
            both = [self.coded(layer, part, each) for part, each in enumerate(both)]
        self.keys[layer], self.values[layer] = (each.transpose(0, 1).double() for each in both)
        if self.window:
            self.exact[layer] = [each[:0] for each in self.exact[layer]]

    def _attend_selected(
        self, selection: BlockSelection, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float
    ) -> Tensor:
        """Token by token and KV head by KV head: those behind the prompt see the tokens of their blocks alone."""
        heads, out = keys.shape[1], attended(query, keys, values, seen, scale=scale)
        groups = query.shape[1] // heads
        for row, place in enumerate(range(len(keys) - len(query), len(keys))):
            for head in range(heads) if place >= self.given else ():
                own = slice(head * groups, (head + 1) * groups)
                mask = torch.zeros(1, len(keys), dtype=torch.bool)
                for block in best_blocks(selection, query[row, own], keys[: place + 1, head]):
                    mask[:, block * selection.block : min((block + 1) * selection.block, place + 1)] = True
                rows = (query[row : row + 1, own], keys[:, head : head + 1], values[:, head : head + 1])
                out[row, own] = attended(*rows, mask, scale=scale)[0]
        return out

    def _attend_packed(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """Query by query, to what each sees of the packed tokens, and to the others, of which ``keys`` and ``values``
        [n, K, D] are, as far as they are ``seen`` [T, n]."""
        assert self.view is not None and self.packed is not None
        found = []
        for row, own in zip(query, seen, strict=True):
            (early,) = self.view.seen(layer, row.unsqueeze(0), self.packed, self.scale)
            key, value = torch.cat([early.keys[0].double(), keys]), torch.cat([early.values[0].double(), values])
            mask = torch.cat([torch.ones(early.keys.shape[1], dtype=torch.bool), own])
            found.append(attended(row.double().unsqueeze(0), key, value, mask.unsqueeze(0), scale=self.scale))
        return torch.cat(found).to(query.dtype)


class KeptScores:
    """What follows a text, for one text after another, where the cache of its sequence is compressed.

    Args:
        model: whose scores they are.
        policy: compresses.
        prompt: with how many tokens the texts begin that count as given.
        places: with how many tokens computed it is compressed; if not told, where the policy is due.
    """

    def __init__(self, model: Decoder, policy: CachePolicy, prompt: int, places: Sequence[int] | None = None) -> None:
        self._model, self._prompt, self._places = model, prompt, places
        self._policy = policy.fitted(model.config)
        self._begin([])

    def _begin(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._context = KeptRows(torch.zeros(0), selection=self._policy.selection, given=self._prompt)
        self._drawn: list[Tensor] = []
        self._dropped = self._compacted = 0
        self._logits: list[Tensor] = []

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Scores [vocabulary] of the token after ``tokens``, float64."""
        return self.every(tokens)[-1]

    @torch.no_grad()
    def every(self, tokens: Sequence[int]) -> list[Tensor]:
        """Those of what follows each of ``tokens``."""
        if list(tokens[: len(self._text)]) != self._text:
            self._begin(tokens)
        while len(self._text) < len(tokens):
            due = self._due()
            if due == len(self._text):
                self._compress()
                continue
            end = len(tokens) if due is None else min(len(tokens), due)
            piece = list(tokens[len(self._text) : end])
            self._context.positions = torch.arange(len(self._text), end)
            hidden = self._model(torch.tensor(piece), self._context).hidden
            self._logits += list(self._model.logits(hidden).double())
            self._text += piece
        return self._logits[: len(tokens)]

    def _due(self) -> int | None:
        if self._places is None:
            return self._policy.due(self._prompt, self._compacted, self._dropped)
        return next((place for place in self._places if place > self._compacted), None)

    def _compress(self) -> None:
        computed = len(self._text)
        count, view = self._policy.keeps(computed), self._policy.view
        if view is None:
            self._compress_layers(count)
        else:
            self._pack(view, count)
        self._dropped, self._compacted, self._context.since = computed - count, computed, count

    def _pack(self, view: View, count: int) -> None:
        context = self._context
        keys, values = (torch.stack(each).float() for each in (context.keys, context.values))
        if context.packed is not None:
            early = view.restored(context.packed)
            keys, values = (torch.cat(pair, 2) for pair in zip(early, (keys, values), strict=True))
        missing = () if context.packed is None else view.missing(context.packed.tokens)
        watched = self._watched(keys, missing) if self._policy.watches else None
        kept = self._policy.compress(Cached(keys, values, watched, None, len(self._text), missing), count)
        if context.coded is not None:
            both = [
                torch.stack([context.coded(0, part, own.transpose(0, 1)).transpose(0, 1) for own in each])
                for part, each in enumerate((kept.keys, kept.values))
            ]
            kept = dataclasses.replace(kept, keys=both[0], values=both[1])
        context.view, context.packed = view, packed_of(self._policy, kept, len(self._text))
        first = view.places(context.packed.tokens)
        context.keys, context.values = (list(each[:, :, first:].double()) for each in (kept.keys, kept.values))

    def _watched(self, keys: Tensor, missing: tuple[int, ...]) -> Tensor:
        """What the last queries paid to tokens with ``keys`` [layers, K, n, D], of which the first are ``missing``."""
        first = max(0, len(self._text) - self._policy.watches)
        found = []
        for layer, (own, gone) in enumerate(zip(keys.double(), missing or (0,) * len(keys), strict=True)):
            shares = shares_of(self._context.queries[layer][first:], own[:, gone:], self._context.scale)
            found.append(torch.nn.functional.pad(shares, (gone, 0)))
        return torch.stack(found)

    def _compress_layers(self, count: int) -> None:
        computed, context = len(self._text), self._context
        watched = min(self._policy.watches, computed)
        for layer, (keys, values) in enumerate(zip(context.keys, context.values, strict=True)):
            drawn = torch.zeros(keys.shape[:2])
            if self._compacted and self._policy.remembers:
                drawn[:, : self._drawn[layer].shape[1]] = self._drawn[layer]
            shares = shares_of(context.queries[layer][computed - watched :], keys, context.scale) if watched else None
            kept = self._policy.compress(Cached(keys.float(), values.float(), shares, drawn), count)
            context.keep(layer, kept)
            self._drawn[layer : layer + 1] = [] if kept.drawn is None else [kept.drawn]


def best_blocks(selection: BlockSelection, query: Tensor, keys: Tensor) -> list[int]:
    """The blocks that the newest of some tokens reads in a KV head, by the rule's definition: ``query`` [H / K, D] is
    that of the token, and ``keys`` [n, D] are those of all, its own among them."""
    length, size = len(keys), selection.block
    blocks = [keys[first : first + size] for first in range(0, length, size)]
    budget = selection.budget * length if selection.budget <= 1 else selection.budget
    count = max(math.ceil(budget / size), selection.first + selection.newest)
    worth = [max(float(each @ block.mean(0)) for each in query) for block in blocks]
    always = [*range(selection.first), *range(len(blocks) - selection.newest, len(blocks))]
    order = sorted(range(len(blocks)), key=lambda number: (number not in always, -worth[number], number))
    return sorted(order[:count])


def packed_of(policy: CachePolicy, kept: Kept, computed: int) -> Packed:
    """What is packed of a cache that was compressed to ``kept`` with so many tokens ``computed``."""
    assert policy.view is not None
    tokens, aside = policy.packed(computed), kept.aside
    first = policy.view.places(tokens)

    def fetch(layer: int, wanted: Tensor) -> Tensor:
        assert aside is not None
        return torch.stack([aside[layer, head, wanted[..., head]] for head in range(wanted.shape[-1])], -2)

    return Packed.of(kept.keys[:, :, :first], kept.values[:, :, :first], tokens, fetch)


def shares_of(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The attention float32 [K, q, n] that the last q queries [q, H, D] of a sequence paid to its ``keys`` [K, n, D],
    query by query and head by head."""
    (count, heads, _), (kv_heads, length, _) = queries.shape, keys.shape
    shares = torch.zeros(kv_heads, count, length, dtype=torch.float64)
    for row in range(count):
        seen = length - count + row + 1
        for head in range(heads):
            own = head * kv_heads // heads
            scores = scale * keys[own, :seen] @ queries[row, head]
            shares[own, row, :seen] += scores.softmax(-1) * kv_heads / heads
    return shares.float()
