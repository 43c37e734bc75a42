"""The contract ``speculate.drafter``: where tokens that may follow come from.

An engine computes a sequence's newest token and, behind it, the drafted ones in one pass. A verifier then says which of
them stay. By default that is the one that chooses as always what comes after each of them, by the draw that belongs to
its place, and keeps drafted tokens as long as they are what was chosen there: the tokens of a sequence are those of
plain decoding, draw for draw, whatever was drafted. For a draft that is tokens, and not a distribution, no rule accepts
more (its chance to accept a token is the token's own).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Protocol, runtime_checkable

import numpy as np

from penstock.policy import Policy, contract
from penstock.speculate.tree import Tree

#: Stands for a token that a model drafts once it is known what else is in the batch.
AWAITED = -1


class Draft(Protocol):
    """What a drafter knows of one sequence. It proposes by the text alone, or also by those of the engine's other
    sequences (:meth:`Drafter.opened`): asked twice behind the same texts, also after a preemption, it proposes the
    same. It is asked on the host while a batch is formed, so what it takes is part of each step."""

    def extend(self, tokens: List[int]) -> None:
        """The sequence goes on by ``tokens``: all that it has gained since it was told last, before it is asked."""
        ...

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow; none where there is nothing to go by, and :data:`AWAITED` in place of
        each that the drafter's model will draft."""
        ...


@runtime_checkable
class Branching(Draft, Protocol):
    """A draft that can be a tree."""

    def grow(self, branches: List[int], depth: int, most: int) -> Tree:
        """A tree of up to ``most`` tokens that may follow, up to ``depth`` of them on each way; that of
        :meth:`Draft.propose` is among the ways, and the only one without ``branches``.

        Args:
            branches: how many drafts a place has at most, by depth; one behind the last.
            depth: how many tokens ahead.
            most: of all ways together.
        """
        ...


class Shaper(Protocol):
    """Says what trees a drafter that probes verifies, for all sequences of an engine."""

    def plan(self, ahead: int, seconds: Callable[[np.ndarray], np.ndarray]) -> None:
        """The next step may draft ``ahead`` tokens on each way, 1 or more, and takes ``seconds`` (or any other unit) if
        each sequence has so many rows."""
        ...

    def shape(self, guessed: int) -> Tree:
        """A tree of :data:`AWAITED` tokens and of probes for a sequence of which so many tokens are ``guessed``: no way
        has more."""
        ...

    def learn(self, shape: Tree, way: List[int]) -> None:
        """Of a tree that was verified, the nodes on this ``way`` were accepted."""
        ...


@runtime_checkable
class Probing(Draft, Protocol):
    """A draft whose tokens were guessed by probes: rows of the step before, behind the token that was accepted last."""

    def shape(self, shaper: Shaper, guessed: int, ahead: int, most: int) -> Tree:
        """A tree of up to ``most`` rows, for as many tokens as are ``guessed``, of which none stands more than
        ``ahead`` tokens behind the newest one, nor a probe.

        Args:
            shaper: that of the engine's drafter.
        """
        ...


@runtime_checkable
class Superposing(Draft, Protocol):
    """A draft of several texts, with all of which a model goes on in one row."""

    def chances(self, ahead: List[int], tokens: List[int], shares: List[float]) -> list[float]:
        """How likely each of some ``tokens`` comes behind the text and the drafted tokens ``ahead`` of it, where the
        model, which does not know these for sure, gives it one of the ``shares``."""
        ...


@contract(
    "speculate.drafter",
    law="the tokens that come out are those of plain decoding, draw for draw: greedy ones identical, sampled ones of "
    "exactly the same distribution; at most as many tokens are drafted as were asked for, and behind the same text the "
    "same ones, where others say nothing; all of this also where trees are drafted, and a tree of one branch is the "
    "chain; what probes guess is drafted no further than they guessed, and none is where its guess would be behind the "
    "text's end; texts that are drafted in one row are those of the definition, in a pass a token; and what is "
    "verified in runs of their own, in the stages of a pipeline, is too",
)
class Drafter(Policy):
    """Drafts tokens for the sequences of an engine: out of their text, or with a model.

    The engine starts a draft when a request comes, and asks it where the budget and the cache have room, telling it
    before what was settled since it was asked last (``serve/engine/room.py``). A
    sequence that drafts takes part in every second of the steps that overlap, since its next step begins with its
    newest token. Requests whose rule has companions draft nothing.
    """

    @property
    def most(self) -> int:
        """How many tokens it drafts for a sequence at a time, at most."""
        raise NotImplementedError

    @property
    def model(self) -> str | None:
        """The model that drafts, whatever ``hub.resolve`` takes; None without one. It has the target's vocabulary, and
        drafts for all sequences of a batch together (``serve/run/draft.py``)."""
        return None

    @property
    def head(self) -> str | None:
        """The folder of the head that drafts, for the very model that is drafted for
        (:mod:`penstock.models.heads.folder`); None without one."""
        return None

    @property
    def branches(self) -> bool:
        """Whether its drafts can be trees: then they are :class:`Branching`."""
        return False

    @property
    def superposes(self) -> int:
        """How many drafts of a sequence its model goes on with in one row (``serve/run/superposed.py``): then they are
        :class:`Superposing`, and a tree that the model shapes as it goes. 0 where each drafted token has its own."""
        return 0

    @property
    def meanwhile(self) -> bool:
        """Whether its model drafts on while what it has drafted is verified (``serve/run/cascade.py``)."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether its drafts learn from texts that have ended: then each is told of the whole of its own."""
        return False

    @property
    def tokens_of_run(self) -> int | None:
        """How many of its tokens a pipeline computes in a run of their own, behind that of the newest token; None where
        all are computed with it."""
        return None

    @property
    def widths(self) -> tuple[int, ...]:
        """How many drafts a place has at most, by depth, where it drafts by probes: then its drafts are
        :class:`Probing`, and there is a :meth:`shaper`. Empty for all others."""
        return ()

    @property
    def rows(self) -> int:
        """How many rows of a step the trees have at most that it drafts by probes."""
        return 0

    def shaper(self) -> Shaper | None:
        """Shapes the trees of an engine where it drafts by probes."""
        return None

    def opened(self) -> Callable[[List[int]], Draft]:
        """:meth:`start` for the sequences of one engine, whose drafts may learn from each other."""
        return self.start

    def start(self, tokens: List[int]) -> Draft:
        """A draft for a sequence that has ``tokens`` now, and no others beside it."""
        raise NotImplementedError
