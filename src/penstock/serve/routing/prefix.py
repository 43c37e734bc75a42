"""The longest prefix that was sent before."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from penstock.policy import policy
from penstock.serve.routing.contract import Event, Example, Load, Routing
from penstock.serve.routing.least_loaded import LeastLoadedRouter
from penstock.serve.routing.prompts import SentPrompts, block_names


class PrefixRouter:
    """Remembers what each replica was sent."""

    def __init__(self, replicas: int, room: int, block: int, ahead: int) -> None:
        self._sent = [SentPrompts(room // block) for _ in range(replicas)]
        self._block, self._ahead = block, ahead
        self._lightest = LeastLoadedRouter(replicas)

    def choose(self, prompt: Sequence[int], root: str, loads: Sequence[Load]) -> int:
        names = block_names(prompt, self._block, root)
        most = min(load.continuations for load in loads if load.open) + self._ahead
        within = {place for place, load in enumerate(loads) if load.open and load.continuations <= most}
        found = {place: self._sent[place].match(names) for place in within}
        longest = {place for place in within if found[place] == max(found.values())}
        among = [load._replace(open=place in longest) for place, load in enumerate(loads)]
        chosen = self._lightest.choose(prompt, root, among)
        self._sent[chosen].add(names)
        return chosen

    def forget(self, replica: int) -> None:
        self._sent[replica].forget()


@policy("serve.routing", "prefix", papers=[297])
class LongestPrefix(Routing):
    """Each request goes to the replica that was sent the longest prefix of its prompt, unless that has too much more to
    do than another one: the turns of a conversation, and requests with the same documents, find what they share in its
    cache.

    From the paper: a global tree of prompts says which instance has how much of a prompt, and the request goes to the
    one with the longest prefix. Ours: the tree is the names of full blocks, a set for each replica, in which what was
    sent longest ago is forgotten beyond the size of its cache; the bound on the load; and the shortest queue among
    replicas with the same prefix. Not built: the pool of the paper that moves blocks between instances, and instances
    that compute prompts only, or continuations only.

    Attributes:
        ahead: a replica with more than so many continuations more than the least loaded one gets no request, whatever
            it was sent.
        block: tokens of a block; a prefix counts by whole ones.
    """

    ahead: int = Field(8, ge=0)
    block: int = Field(16, ge=1)

    def start(self, replicas: int, room: int) -> PrefixRouter:
        return PrefixRouter(replicas, room, self.block, self.ahead)

    @property
    def unit(self) -> int:
        return self.block

    @property
    def lead(self) -> int:
        return self.ahead + 1

    @classmethod
    def example(cls) -> Example:
        """The third request begins as the second did, and goes to the same replica; so does the fourth, though that
        replica is one ahead: as far as it may be. Then it is two ahead, and the fifth goes to the first replica, which
        has the prefix too from now on: the sixth finds two blocks at both, and goes to the one that has less to do."""
        events = [Event([9, 9]), Event([1, 2]), Event([1, 2, 3]), Event([1, 2, 3, 4]), Event([1, 2, 3]), Event([1, 2])]
        return Example(cls(ahead=1, block=1), 2, events, [0, 1, 1, 1, 0, 0])
