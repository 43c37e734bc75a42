"""Drafting trees: each generation in one pass, for all sequences of a batch together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np

from penstock.serve.choose.proposals import BranchingSampler
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.drafted import Drafted
from penstock.serve.run.chains import Going
from penstock.speculate.tree import path


class Trees:
    """Drafts as many tokens for a place as a :class:`~penstock.serve.choose.proposals.BranchingSampler` does.

    A pass computes all tokens of the trees so far anew: they lie in the cache behind each other, where none of another
    way may be seen, and a mask is over new tokens alone. It scores those of the last generation.
    """

    def grow(
        self,
        compute: Callable[[list[Entry], np.ndarray, int], tuple[list[Entry], Sampled | None]],
        sampler: Sampler,
        first: list[Entry],
        wanted: dict[int, int],
        tables: np.ndarray,
        going: Going | None = None,
    ) -> Drafted:
        """See :meth:`penstock.serve.run.chains.Chains.grow`."""
        assert isinstance(sampler, BranchingSampler)
        drafted, depth, entries = Drafted(), 0, first
        growing = {entry.slot: self._growing(entry, wanted[entry.slot]) for entry in first if entry.scored}
        while entries:
            scored, sampled = compute(entries, tables, depth)
            if sampled is None:
                break
            drafts = sampler.drafts.tolist()
            begun = len(drafted.drafts)
            row, asked = 0, list[tuple[Entry, int]]()
            for entry in scored:
                own = growing[entry.slot]
                if own.way_row is not None:
                    asked.append((entry, row + own.way_row))
                own.take(drafts[row : row + entry.scored], begun + row)
                row += entry.scored
            if going is not None and asked:
                rows = [row for _, row in asked]
                more = going([entry for entry, _ in asked], sampled.tokens[rows], rows)
                for (entry, _), on in zip(asked, more, strict=True):
                    if not on:
                        growing[entry.slot].end()
            if sampler.proposed is not None:
                drafted.chances.append(sampler.proposed)
                drafted.drafts += drafts
            depth += 1
            entries = [each.generation() for each in growing.values() if each.goes_on]
        for slot, each in growing.items():
            drafted.windows[slot], drafted.parents[slot] = each.tokens, each.parents
            drafted.rows[slot], drafted.ways[slot] = each.rows, each.way
        return drafted

    def _growing(self, entry: Entry, wanted: int) -> Growing:
        """The tree behind ``entry``."""
        return Growing(entry, wanted)


class Growing:
    """A tree of one sequence.

    Args:
        entry: brings the sequence's newest token.
        wanted: how far its text is to go, in tokens that have to be computed here.

    Attributes:
        tokens, parents: as of :class:`~penstock.speculate.tree.Tree`.
        rows: of the newest token and each of the tree, which row what follows it was drafted in; -1 for none.
        way: which tokens are the first drafts behind each other, from the newest token on.
    """

    def __init__(self, entry: Entry, wanted: int) -> None:
        self._sequence, self._slot, self._start = entry.sequence, entry.slot, entry.start + entry.count
        self._left = wanted - self._start + 1
        self._last: List[int] = [-1]
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.rows = [-1]
        self.way: list[int] = []

    @property
    def way_row(self) -> int | None:
        """Which of the tokens of the last generation that go on is on the way of the first drafts; None where that has
        ended."""
        end = self.way[-1] if self.way else -1
        return self._last.index(end) if end in self._last else None

    def end(self) -> None:
        """There are no more generations."""
        self._last = ()

    def take(self, drafts: list[list[int]], row: int) -> None:
        """Of each token of the last generation that goes on, in order, the ``drafts`` behind it, -1 for none, and the
        first one's ``row``. Whatever is drafted twice in a place is there once."""
        ended: list[tuple[int, int]] = []
        going: list[tuple[int, int]] = []
        at = self.way_row
        first = None if at is None or drafts[at][0] < 0 else (drafts[at][0], self._last[at])
        for number, (node, own) in enumerate(zip(self._last, drafts, strict=True)):
            self.rows[node + 1] = row + number
            self._divide(node, own, ended, going)
        self._add(ended, going, first)

    def _divide(self, node: int, own: List[int], ended: list[tuple[int, int]], going: list[tuple[int, int]]) -> None:
        """Puts the drafts behind ``node``, each with it, to those that end the text or to those that do not."""
        before = [self.tokens[each] for each in path(self.parents, node)]
        for token in dict.fromkeys(own):
            if token >= 0:
                (going if self._allows(before, token) else ended).append((token, node))

    def _add(
        self, ended: list[tuple[int, int]], going: list[tuple[int, int]], first: tuple[int, int] | None = None
    ) -> None:
        """The next generation of the tree is there; ``first`` of it is the next on the way of the first drafts."""
        # Those that go on are the last, since the last are scored.
        for token, node in (*ended, *going):
            if (token, node) == first:
                self.way.append(len(self.tokens))
            self.tokens.append(token)
            self.parents.append(node)
            self.rows.append(-1)
        self._left -= 1
        end = len(self.tokens)
        self._last = range(end - len(going), end) if self._left else ()

    def _allows(self, before: list[int], token: int) -> bool:
        """Whether ``token`` does not end the text."""
        matcher = self._sequence.matcher
        if token in self._sequence.stop:
            return False
        return matcher is None or matcher.allowed([*before, token]) > len(before)

    @property
    def goes_on(self) -> bool:
        """Whether there is more to draft."""
        return len(self._last) > 0

    def generation(self) -> Entry:
        """The tree so far, of whose last generation those are scored that go on."""
        size, window, parents = len(self.tokens), tuple(self.tokens), tuple(self.parents)
        return Entry(self._sequence, self._slot, self._start, size, len(self._last), window=window, parents=parents)
