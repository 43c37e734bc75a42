"""What a model drafts for an engine, and what that asks of the one who drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Protocol

import torch
from torch import Tensor

from penstock.serve.choose.proposals import Proposals
from penstock.serve.engine.batch import Batch

#: Whether another token is drafted, by the predicted chances of those that were; see
#: :meth:`penstock.speculate.controllers.contract.Control.goes_on`.
GoesOn = Callable[[List[float]], bool]


@dataclasses.dataclass
class Drafted:
    """What was drafted.

    Attributes:
        windows: the tokens, by the slot of their sequence.
        chances: the distributions float32 [n, V] of each pass that they were drawn from, where they are written down.
        drafts: for each row of these, the tokens that were drawn from it, -1 for none.
        rows: by slot, the rows behind which what follows its newest token, and each of its window, was drawn; -1 where
            nothing was.
        parents: of trees, by slot, as of :attr:`~penstock.serve.engine.batch.Entry.parents`.
        ways: of trees, by slot, which of its tokens are on the way that the model would take itself.
        probes: where there are some, by slot, as of :attr:`~penstock.serve.engine.batch.Entry.probes`.
    """

    windows: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    chances: list[Tensor] = dataclasses.field(default_factory=list)
    drafts: list[list[int]] = dataclasses.field(default_factory=list)
    rows: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    parents: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    ways: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    probes: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def confidence(self) -> dict[int, list[float]]:
        """By slot, for each token the probability of the one that was the likeliest in its place."""
        sure = [each for chances in self.chances for each in chances.amax(-1).tolist()]
        return {slot: [sure[row] for row in self.rows[slot][: len(own)]] for slot, own in self.windows.items()}

    def cut(self, kept: dict[int, int]) -> None:
        """No more than so many tokens of each slot are verified, all in a row."""
        for slot, count in kept.items():
            del self.windows[slot][count:], self.rows[slot][count:]

    def way(self, slot: int) -> list[int]:
        """The tokens of a slot that the model would say itself, one behind the other."""
        window = self.windows[slot]
        return [window[node] for node in self.ways[slot]] if slot in self.ways else list(window)

    def adopt(self, other: Drafted, slot: int, most: int) -> None:
        """Takes over what ``other`` has of ``slot``: of a chain, the first ``most`` tokens, of a tree all."""
        trees, rows = slot in other.parents, other.rows.get(slot, [])
        self.windows[slot] = other.windows[slot] if trees else other.windows[slot][:most]
        if trees:
            self.parents[slot], self.ways[slot] = other.parents[slot], other.ways[slot]
        first, own = sum(map(len, self.chances)), [row for row in rows if row >= 0] if other.chances else []
        if own:
            self.chances.append(torch.cat(other.chances)[own])
            self.drafts += [other.drafts[row] for row in own]
        if rows:
            places = {row: first + place for place, row in enumerate(own)}
            kept = [places.get(row, -1) for row in rows]
            self.rows[slot] = kept if trees else kept[:most]


class DraftExecutor(Protocol):
    """Drafts for all sequences of a batch together: a model, or a head."""

    def prepare(self, batch: Batch) -> None:
        """The target is about to compute ``batch``."""
        ...

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        """Drafts for the entries of ``batch`` that await tokens; ``goes_on`` is for those who predict."""
        ...

    def proposals(self, drafted: Drafted, slots: int) -> Proposals | None:
        """What was ``drafted`` for sequences in some of so many ``slots``, for the one who verifies it."""
        ...
