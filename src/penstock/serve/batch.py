"""What one step computes."""

from __future__ import annotations

import dataclasses

from penstock.serve.sampler import Sampled
from penstock.serve.sequence import Sequence


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
    """The pieces of a step, and what came out of it once it is launched."""

    entries: list[Entry]
    sampled: Sampled | None = None
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """How many tokens are computed."""
        return sum(entry.count for entry in self.entries)
