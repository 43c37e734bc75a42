"""What replicas were sent: how much of a prompt one of them should have in its cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from penstock.serve.kv.pool import name_behind


def block_names(prompt: Sequence[int], size: int, root: str = "") -> list[bytes]:
    """Names of the full blocks of ``size`` tokens of ``prompt``, in order: of two prompts with the same ``root``, as
    many are equal as the blocks that both begin with."""
    names, name = list[bytes](), root.encode()
    for start in range(0, len(prompt) - size + 1, size):
        name = name_behind(name, prompt[start : start + size])
        names.append(name)
    return names


class SentPrompts:
    """The blocks of the prompts that one replica was sent, as far as they fit its cache.

    A cache keeps what was used last, and the beginning of a text no shorter than what follows it; so does this.

    Args:
        room: blocks of the cache.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        #: The least recently sent first; of one prompt the last block first.
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def match(self, names: Sequence[bytes]) -> int:
        """How many of the blocks that a prompt begins with are there."""
        return sum(1 for _ in takewhile(self._names.__contains__, names))

    def add(self, names: Sequence[bytes]) -> None:
        """The blocks of a prompt were sent."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._room:
            self._names.popitem(last=False)

    def forget(self) -> None:
        """The cache is empty again."""
        self._names.clear()
