"""Contexts that are moved to where they stand, and computed again in part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from penstock.policy import policy
from penstock.serve.kv.reuse.contract import ChunkCache, Neighbour, Reuse


@policy("kv.reuse", "cache_craft", papers=[225])
class CacheCraft(Reuse):
    """Encodes contexts in a row, and keeps the keys and values of each by itself: wherever it comes again, they are
    moved there, and computed again are only those tokens that depended most on what stood before them then
    (Cache-Craft).

    From the paper [225]: chunk-caches are reused at any place and behind any texts; a small part of their tokens is
    computed again, to keep the quality; chunk-caches are stored in tiers and evicted. From what is known of it beyond
    its abstract, unconfirmed: keys are rotated to their new positions; tokens are chosen by the attention that they
    paid to texts before their chunk, and how many by how much of those texts stands before it again, and in which
    order.

    Ours: the score of a token is the attention to those texts alone that do not stand in their old place, or to all
    where each of them does. The reuse score s of a context is the share of the outside attention that its old
    neighbours drew which stand before it again, times their share of the tokens that stand before it now, times the
    share of their pairs that are in their old order: it is 1 only where nothing has changed. Of n tokens,
    n (1 - (1 - recompute)^(1 - s)) are computed again, rounded up: the share ``recompute`` where nothing is as it was,
    and all with ``recompute`` = 1. A context's cache is a text of the prefix tree, with its last block, be it full or
    not: it is evicted, and comes back from the host's memory and the disk, as all others. Not built: several caches of
    one context, of which the nearest is taken; recomputation that ends early by layer; loading layer by layer.

    Attributes:
        recompute: the share of a context's tokens that are computed again where nothing is as it was.
    """

    recompute: Annotated[float, Field(ge=0, le=1)] = 0.3

    @property
    def moves(self) -> bool:
        return True

    def grades(self) -> list[Self]:
        return [self.model_copy(update={"recompute": share}) for share in (0.0, 0.3, 0.6, 1.0)]

    def limit(self) -> Self:
        return self.model_copy(update={"recompute": 1.0})

    def renewed(self, cache: ChunkCache, start: int, before: Sequence[Neighbour]) -> np.ndarray:
        count = len(cache.drawn)
        share = 1 - (1 - self.recompute) ** (1 - reuse_score(cache, before))
        wanted = min(count, math.ceil(round(count * share, 9)))  # an integer stays one, whatever its last bits are
        order = np.argsort(-_dependence(cache, before), kind="stable")
        return np.sort(order[:wanted]).astype(np.int64)


def reuse_score(cache: ChunkCache, before: Sequence[Neighbour]) -> float:
    """How much of what stood before a context, when it was cached, stands ``before`` it now: from 0 to 1."""
    old, new = {each.name: place for place, each in enumerate(cache.before)}, {each.name for each in before}
    drawn = cache.drawn.sum(0, dtype=np.float64)
    again = [place for name, place in old.items() if name in new]
    if not again or not before:
        return 0.0
    attention = drawn[again].sum() / max(drawn.sum(), np.finfo(np.float64).tiny)
    tokens = sum(each.tokens for each in before if each.name in old) / sum(each.tokens for each in before)
    places = list(dict.fromkeys(old[each.name] for each in before if each.name in old))
    pairs = [early < late for early, late in itertools.combinations(places, 2)]
    return float(min(1.0, attention) * tokens * (sum(pairs) / len(pairs) if pairs else 1.0))


def _dependence(cache: ChunkCache, before: Sequence[Neighbour]) -> np.ndarray:
    """Of each token of a context, how much it looked at what does not stand before it as it did: float64 [n]."""
    kept = {(each.name, each.start) for each in before}
    gone = [place for place, each in enumerate(cache.before) if (each.name, each.start) not in kept]
    drawn = cache.drawn[:, gone] if gone else cache.drawn
    found: np.ndarray = drawn.sum(1, dtype=np.float64)
    return found
