"""The contract ``kv.reuse``: how the contexts of a request are encoded, and what of them is reused.

A request may name contexts beside its prompt: documents that were retrieved, or examples. They stand behind the first
``shared`` tokens of the prompt, and before the rest. Other requests have some of them too, in another order and beside
others, where a prefix tree finds the first of them at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from penstock.policy import Policy, contract


class Weighing(NamedTuple):
    """How contexts that are encoded beside each other are attended to: by the ``temperature`` of their scores and the
    ``scale`` of their log-sum-exp, see :mod:`penstock.ops.paged.contexts`."""

    temperature: float
    scale: float


class Neighbour(NamedTuple):
    """A text that stands before a context in its prompt: its ``name``, which says what its tokens are, the position of
    the first, and how many they are."""

    name: bytes
    start: int
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkCache:
    """The keys and values of a context, as they were computed for a request that had it.

    Attributes:
        tokens: its own.
        start: the position of the first of them there.
        behind: a name for all that its keys and values depend on, its own tokens aside.
        mark: a name for the keys and values.
        before: what stood before it there, in order; the first is the beginning of the prompt, if there was one.
        drawn: float32 [n, len(before)], the share of its attention that each of its n tokens paid to each of these,
            averaged over query heads and layers.
    """

    tokens: list[int]
    start: int
    behind: bytes
    mark: bytes
    before: tuple[Neighbour, ...]
    drawn: np.ndarray


@contract(
    "kv.reuse",
    law="in the limiting case that the policy gives, contexts that are encoded in a row, and one that is encoded "
    "apart, give the scores of the text in a row, to 1e-5; contexts that are encoded apart may come in any order; "
    "scores equal those of one softmax over all that a token sees, where contexts were moved too; the more of a moved "
    "context is computed again, the nearer the scores are to those in a row, on average; what is found in the cache is "
    "counted, and not computed again; the tokens of a request do not depend on the batch, on chunks, on sharing or "
    "preemption",
)
class Reuse(Policy):
    """Decides how the contexts of a request are encoded."""

    @property
    def weighing(self) -> Weighing | None:
        """How contexts are attended to that are encoded apart, each behind the prompt's shared tokens and at the
        positions behind these; None where they are encoded one behind the other, as a part of the prompt."""
        return None

    @property
    def moves(self) -> bool:
        """Whether contexts in a row are cached by themselves, and taken from there wherever they stand: see
        :meth:`renewed`."""
        return False

    @property
    def plain(self) -> bool:
        """Whether a prompt with contexts is as good as one without."""
        return self.weighing is None and not self.moves

    def renewed(self, cache: ChunkCache, start: int, before: Sequence[Neighbour]) -> np.ndarray:
        """Which tokens of a context that is taken from ``cache``, and stands at the position ``start`` behind other
        texts than there, are computed again: their places in the context, int64, ascending."""
        raise NotImplementedError

    def grades(self) -> list[Self]:
        """The policy with options by which more and more of a moved context is computed again, up to all of it."""
        return []

    def limit(self) -> Self:
        """The policy with options by which contexts, or a single one where they are encoded apart, are as good as in a
        row."""
        return self
