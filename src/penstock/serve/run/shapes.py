"""Drafting trees whose shapes were planned, with probes behind their tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np

from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.drafted import Drafted
from penstock.serve.run.chains import Going
from penstock.serve.run.trees import Growing, Trees


class Shapes(Trees):
    """Drafts trees of the shapes that the entries of ``batch`` have: as many drafts for each place."""

    def __init__(self, batch: Batch) -> None:
        self._shapes = {entry.slot: entry for entry in batch.entries if entry.window}
        self._filling: dict[int, Filling] = {}

    def grow(
        self,
        compute: Callable[[list[Entry], np.ndarray, int], tuple[list[Entry], Sampled | None]],
        sampler: Sampler,
        first: list[Entry],
        wanted: dict[int, int],
        tables: np.ndarray,
        going: Going | None = None,
    ) -> Drafted:
        drafted = super().grow(compute, sampler, first, wanted, tables, going)
        drafted.probes = {slot: each.probes for slot, each in self._filling.items()}
        return drafted

    def _growing(self, entry: Entry, wanted: int) -> Growing:
        filling = self._filling[entry.slot] = Filling(entry, wanted, self._shapes[entry.slot])
        return filling


class Filling(Growing):
    """A tree of one sequence that has a shape.

    Args:
        entry: brings the sequence's newest token.
        wanted: how far its text is to go, in tokens that have to be computed here.
        shape: has the tree, with its probes, in its window.

    Attributes:
        probes: behind the newest token and each of the tree.
    """

    def __init__(self, entry: Entry, wanted: int, shape: Entry) -> None:
        super().__init__(entry, wanted)
        self._shape = shape
        self._children: dict[int, list[int]] = {}
        for node, parent in enumerate(shape.parents or range(-1, len(shape.window) - 1)):
            self._children.setdefault(parent, []).append(node)
        #: Which of the shape's nodes each of the tree is, the newest token the first.
        self._place = [-1]
        self.probes = list(shape.probes[:1] or (0,))

    def take(self, drafts: list[list[int]], row: int) -> None:
        """Of the drafts for each place, as many as it has children in the shape; the others count as not drafted."""
        ended: list[tuple[int, int]] = []
        going: list[tuple[int, int]] = []
        first, drafted = len(self.tokens), dict(zip(self._last, drafts, strict=True))
        for number, (node, own) in enumerate(drafted.items()):
            children = self._behind(node)
            own[len(children) :] = [-1] * (len(own) - len(children))  # for the verifier, too
            if children:
                self.rows[node + 1] = row + number
                self._divide(node, own, ended, going)
        self._add(ended, going)
        for node in range(first, len(self.tokens)):
            parent = self.parents[node]
            child = self._behind(parent)[drafted[parent].index(self.tokens[node])]
            self._place.append(child)
            # Nothing comes behind a token that ends the text.
            goes_on = node >= first + len(ended) and self._shape.probes
            self.probes.append(self._shape.probes[child + 1] if goes_on else 0)
        if not any(self._behind(node) for node in self._last):
            self._last = ()

    def _behind(self, node: int) -> List[int]:
        """The children in the shape of what the tree's ``node`` is there."""
        return self._children.get(self._place[node + 1], ())
