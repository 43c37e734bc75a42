"""The contract ``serve.routing``: which replica of a model a request is sent to.

A *replica* is an engine with a cache of its own. What it has computed for one request it need not compute again for
another one that begins in the same way; what another replica has computed is of no use to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from penstock.policy import Policy, contract, unwritten


class Load(NamedTuple):
    """What a replica has to do.

    Attributes:
        continuations: that were sent there, and whose requests are under way.
        tokens: of the prompts of those requests that have not brought a token yet.
        open: whether it takes requests: it is there, and is not drained.
    """

    continuations: int = 0
    tokens: int = 0
    open: bool = True


class Router(Protocol):
    """The state of a policy at work."""

    def choose(self, prompt: Sequence[int], root: str, loads: Sequence[Load]) -> int:
        """The replica that a request is sent to now; it is open, as at least one of ``loads`` is.

        Args:
            prompt: the request's tokens.
            root: prompts of different roots have no prefix in common, whatever their tokens are: it is the name of the
                adapter that they are computed with.
            loads: of all replicas, in their order.
        """
        ...

    def forget(self, replica: int) -> None:
        """What a replica had in its cache is gone: it was started anew, or has other weights."""
        ...


class Event(NamedTuple):
    """A request of an example, with one continuation, which ends before the request number ``ends`` is sent; None is
    never."""

    prompt: Sequence[int]
    ends: int | None = None


class Example(NamedTuple):
    """What a policy decides in one course of events.

    Attributes:
        routing: the policy.
        replicas: how many there are, all of them open.
        events: requests, in their order.
        sent: to which replica each of them goes.
    """

    routing: Routing
    replicas: int
    events: list[Event]
    sent: list[int]


@contract(
    "serve.routing",
    law="a replica that takes no requests gets none; the same course of events has the same choices; of requests of "
    "one length that do not end, no replica gets more ahead of another than the policy says; greedy and drawn tokens "
    "are those of one engine, also where a replica is lost and its requests go to another, or where one is drained; "
    "a policy that keeps prefixes together finds the longest, as by brute force, and no less of conversations in "
    "caches than one engine does; in one course of events, the choices that the policy gives, worked out by hand",
)
class Routing(Policy):
    """Chooses replicas.

    A policy gives :meth:`start`, :attr:`lead`, and :meth:`example` for its law.
    """

    def start(self, replicas: int, room: int) -> Router:
        """A router for so many replicas, each of which has room for ``room`` tokens in its cache."""
        raise NotImplementedError

    @property
    def unit(self) -> int | None:
        """Requests go where others were sent that begin with the same tokens, counted in pieces of so many; None where
        it does not matter how they begin."""
        return None

    @property
    def lead(self) -> int:
        """The most requests by which one replica may be ahead of another, where all have one continuation and the same
        length, and none ends: so no replica that is open waits for ever."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> Example:
        """A course of events, and what a policy of this kind decides.

        Work it out by hand: the law holds the code against it.
        """
        raise unwritten(cls, "example()", "return Example(routing, replicas, events, sent) for one course of events")
