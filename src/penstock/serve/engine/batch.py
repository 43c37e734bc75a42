"""What one step computes."""

from __future__ import annotations

import dataclasses

from penstock.serve.choose.sampler import Sampled
from penstock.serve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A piece of a sequence: its tokens [start, start + count), which the cache does not have yet.

    ``slot`` is its row in the runner's tables; ``scored`` says for how many of the last of these tokens the scores of
    the next one are wanted: 0 for a piece of a prompt, 1 where the sequence goes on from it. ``rated`` says for how
    many of the first of them the log-probability of the prompt's next token is wanted.
    """

    sequence: Sequence
    slot: int
    start: int
    count: int
    scored: int
    rated: int = 0


@dataclasses.dataclass
class Batch:
    """The pieces of a step, and what came out of it once it is launched.

    Attributes:
        entries: the pieces.
        parts: how many of the entries, in order, make a nano-batch: a pass of its own, beside the others where the
            device can do two things at a time. No entry reads what an entry of another part writes.
        lead: the part that goes first where two want the same.
        sampled: what came out.
        seconds: what the step took on the host.
    """

    entries: list[Entry]
    parts: tuple[int, ...] = ()
    lead: int = 0
    sampled: Sampled | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.parts = self.parts or (len(self.entries),)

    @property
    def tokens(self) -> int:
        """How many tokens are computed."""
        return sum(entry.count for entry in self.entries)
