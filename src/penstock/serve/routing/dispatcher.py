"""Who has which request, and what all of them have to do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from penstock.core.errors import PenstockError
from penstock.serve.messages import Request
from penstock.serve.routing.contract import Load, Routing


class NoReplicaError(PenstockError):
    """No replica takes requests."""


@dataclasses.dataclass
class Sent:
    """A request under way at a ``replica``.

    Attributes:
        final: it stays there or fails, as some of its tokens were told, or it is to end.
    """

    replica: int
    continuations: int
    tokens: int
    final: bool = False


class Dispatcher:
    """Sends requests to replicas, and keeps count of them.

    Args:
        routing: the policy that chooses.
        replicas: how many there are.
        room: tokens of the cache of each.
    """

    def __init__(self, routing: Routing, replicas: int, room: int) -> None:
        self._router = routing.start(replicas, room)
        self._replicas = range(replicas)
        self._sent: dict[str, Sent] = {}

    def loads(self, open: Sequence[bool]) -> list[Load]:
        """What each replica has to do; those take requests that are ``open``."""
        continuations, tokens = [0] * len(self._replicas), [0] * len(self._replicas)
        for each in self._sent.values():
            continuations[each.replica] += each.continuations
            tokens[each.replica] += 0 if each.final else each.tokens
        return [Load(*each) for each in zip(continuations, tokens, open, strict=True)]

    def send(self, request: Request, open: Sequence[bool]) -> int:
        """The replica that gets ``request``, one of those that are ``open``.

        Raises:
            NoReplicaError: none is.
        """
        if not any(open):
            raise NoReplicaError("no replica takes requests at this moment; try again later")
        contexts = itertools.chain.from_iterable(request.contexts)
        prompt = [*request.prompt[: request.shared], *contexts, *request.prompt[request.shared :]]
        chosen = self._router.choose(prompt, request.adapter, self.loads(open))
        self._sent[request.id] = Sent(chosen, request.sampling.continuations, request.length)
        return chosen

    def replica_of(self, id: str) -> int | None:
        """That which has the request ``id``; None where it is not under way."""
        return self._sent[id].replica if id in self._sent else None

    def settle(self, id: str) -> None:
        """The request ``id`` stays where it is: some of its tokens were told, or it is to end."""
        if id in self._sent:
            self._sent[id].final = True

    def may_move(self, id: str) -> bool:
        """Whether another replica may answer the request ``id`` from its beginning."""
        return not self._sent[id].final

    def done(self, id: str) -> None:
        """The request ``id`` is over, or no more where it was."""
        del self._sent[id]

    def forget(self, replica: int) -> None:
        """What ``replica`` had in its cache is gone."""
        self._router.forget(replica)
