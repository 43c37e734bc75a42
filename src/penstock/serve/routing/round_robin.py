"""Round robin."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.policy import policy
from penstock.serve.routing.contract import Event, Example, Load, Routing


class RoundRobinRouter:
    """The replicas in turn; those that take no requests lose theirs."""

    def __init__(self, replicas: int) -> None:
        self._replicas, self._next = replicas, 0

    def choose(self, prompt: Sequence[int], root: str, loads: Sequence[Load]) -> int:
        turns = ((self._next + turn) % self._replicas for turn in range(self._replicas))
        chosen = next(replica for replica in turns if loads[replica].open)
        self._next = chosen + 1
        return chosen

    def forget(self, replica: int) -> None:
        """It knows nothing of caches."""


@policy("serve.routing", "round_robin")
class RoundRobin(Routing):
    """Each request goes to the replica behind the last one's, whatever they have to do."""

    def start(self, replicas: int, room: int) -> RoundRobinRouter:
        return RoundRobinRouter(replicas)

    @property
    def lead(self) -> int:
        return 1

    @classmethod
    def example(cls) -> Example:
        """Neither what is under way nor how requests begin matters."""
        return Example(cls(), 3, [Event([1], 1), Event([1], 2), Event([2]), Event([2]), Event([1])], [0, 1, 2, 0, 1])
