"""The shortest queue."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.policy import policy
from penstock.serve.routing.contract import Event, Example, Load, Routing


class LeastLoadedRouter:
    """The replica with the least to do; among equals, the next in turn."""

    def __init__(self, replicas: int) -> None:
        self._replicas, self._next = replicas, 0

    def choose(self, prompt: Sequence[int], root: str, loads: Sequence[Load]) -> int:
        def burden(replica: int) -> tuple[int, int, int]:
            load = loads[replica]
            return load.continuations, load.tokens, (replica - self._next) % self._replicas

        chosen = min((replica for replica, load in enumerate(loads) if load.open), key=burden)
        self._next = chosen + 1
        return chosen

    def forget(self, replica: int) -> None:
        """It knows nothing of caches."""


@policy("serve.routing", "least_loaded")
class LeastLoaded(Routing):
    """Each request goes where the fewest continuations are under way, among equals where the fewest tokens of prompts
    have yet to be computed, and then to the next in turn: the shortest queue.

    Ours: what counts as the length of a queue. Continuations come first, since each of them takes part in every step
    until it ends; a prompt is computed once.
    """

    def start(self, replicas: int, room: int) -> LeastLoadedRouter:
        return LeastLoadedRouter(replicas)

    @property
    def lead(self) -> int:
        return 1

    @classmethod
    def example(cls) -> Example:
        """The third request finds one continuation everywhere, and the fewer tokens of a prompt at the second replica.
        When the fourth comes the first two have ended: one is under way at the second replica, none at the first. The
        fifth finds the same at both, and the second is next in turn."""
        events = [Event([1, 2, 3], 3), Event([1], 3), Event([1, 2]), Event([3, 4]), Event([5])]
        return Example(cls(), 2, events, [0, 1, 1, 0, 1])
