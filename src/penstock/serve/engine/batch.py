"""What one step computes."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Sampled
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.chunks import Chunk
from penstock.serve.kv.compaction import Compaction
from penstock.serve.kv.moving import Move
from penstock.serve.kv.reuse.contract import Weighing
from penstock.speculate.tree import Tree, chain, depths


class Beside(NamedTuple):
    """What tokens of an entry see beside their own text.

    Attributes:
        after: the first token of the sequence that sees it.
        shift: how far behind its place in the text the position is of that token, and of all behind it.
        slots: int64 [c], where the keys and values of the contexts are.
        weighing: how it sees them.
    """

    after: int
    shift: int
    slots: np.ndarray
    weighing: Weighing


class Entry(msgspec.Struct, frozen=True):  # one for each sequence at each step: a frozen dataclass takes longer
    """A piece of a sequence: its tokens [start, start + count), which the cache does not have yet. A sequence has
    several in a step where the cache has some of the tokens between them.

    Attributes:
        sequence: whose tokens they are.
        slot: its row in the tables.
        start, count: which of its tokens.
        dropped: how many of those before them are not in the cache any more: token ``start`` goes to the place
            ``start - dropped``.
        packed: how many of those before them share the first places, see :attr:`PagedBatch.packed`.
        scored: after how many of the last of these tokens the scores of the next one are wanted: 0 for a piece of a
            prompt, 1 where the sequence goes on from it, 1 + len(window) where drafted tokens are verified, and as many
            as can have a next one where a tree is drafted.
        prompt_logprobs: after how many of them, from ``prompt_logprobs_from`` on, the log-probability of the prompt's
            next token is wanted.
        prompt_logprobs_from: the first of those, counted from ``start``.
        window: the last of the tokens, where they are tentative: drafted, and not settled yet; or awaited from a model
            that drafts, until the batch is launched.
        parents: of each token of the window, where in it the one before it stands, -1 for those behind the newest
            token; none where they are in a row. A tree's tokens lie in the cache in the order of the window, and have
            the positions of their depths.
        again: how often the last token is computed again with other experts.
        probes: how many probes stand behind the newest token, and behind each of the window; none where there are no
            probes at all. They are rows that are no tokens of the sequence, each of which sees the tokens on the way to
            its own, that one, and the probes before it behind the same. They are computed behind the window, count
            neither as its tokens nor among the scored ones, and nothing of them stays in the cache.
        beside: the contexts that some of the tokens see; None where there are none.
        weighed: of which contexts in its text it is asked what their tokens, as far as they are here, look at.
        since: from which place on windows in full precision are counted, see :attr:`PagedBatch.since`.
    """

    sequence: Sequence
    slot: int
    start: int
    count: int
    scored: int
    prompt_logprobs: int = 0
    prompt_logprobs_from: int = 0
    window: tuple[int, ...] = ()
    dropped: int = 0
    packed: int = 0
    parents: tuple[int, ...] = ()
    again: int = 0
    beside: Beside | None = None
    weighed: tuple[Chunk, ...] = ()
    probes: tuple[int, ...] = ()
    since: int = 0

    @property
    def rows(self) -> int:
        """How many tokens and probes are computed."""
        return self.count + sum(self.probes) if self.probes else self.count

    @property
    def tree(self) -> Tree:
        """The window, as a tree."""
        return Tree(list(self.window), list(self.parents) or chain(self.window).parents, self.probes)

    @property
    def ahead(self) -> int:
        """How many tentative tokens there are on the longest way."""
        return max(depths(self.parents)) if self.parents else len(self.window)


class Awaited(Protocol):
    """What will come out of a batch."""

    def wait(self) -> Sampled | None:
        """What has come out, once it is there; None where nothing does."""
        ...


@dataclasses.dataclass
class Batch:
    """The pieces of a step, and what came out of it once it is launched.

    Attributes:
        entries: the pieces.
        tables: int32 [slots, most blocks], the blocks of each slot's sequence.
        compactions: caches to be compressed before anything else.
        copies: blocks (from, to) to be copied before the step, since a sequence writes to a frozen one.
        moves, keeps: tokens that are moved before the step, and behind it, see :class:`~penstock.serve.run.step.Step`.
        restored: blocks that were brought back, or filled from others, since the last step: what else was known of
            them is void.
        parts: how many of the entries, in order, make a nano-batch: a pass of its own, beside the others where the
            device can do two things at a time. No entry reads what an entry of another part writes.
        lead: the part that goes first where two want the same.
        ahead: how many tokens may be drafted for a sequence in this step.
        proposals: what the tentative tokens were drawn from, where a verifier asks for it.
        sampled: what comes out, to be waited for.
        launched: when it was launched, in seconds.
        seconds: what the step took on the host.
        asleep: whether the controller of drafts rests in it, and is not told of it.
        begun: when it was formed, ``drafting``, the seconds that drafting for it took, and ``took``, those of the whole
            step if they can be told, where anything is drafted.
    """

    entries: list[Entry]
    tables: np.ndarray
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    restored: list[int] = dataclasses.field(default_factory=list)
    parts: tuple[int, ...] = ()
    lead: int = 0
    ahead: int = 0
    proposals: Proposals | None = None
    sampled: Awaited | None = None
    launched: float = 0.0
    seconds: float = 0.0
    asleep: bool = False
    begun: float = 0.0
    drafting: float = 0.0
    took: float | None = None
    compactions: list[Compaction] = dataclasses.field(default_factory=list)
    moves: list[Move] = dataclasses.field(default_factory=list)
    keeps: list[Move] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = self.parts or (len(self.entries),)

    @functools.cached_property
    def tokens(self) -> int:
        """How many tokens are computed, probes and copies with other experts too; asked once the batch is launched."""
        return sum(entry.rows + entry.again for entry in self.entries)
