"""The prefixes that waiting prompts share, as a tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as List

from penstock.serve.engine.sequence import Sequence


@dataclasses.dataclass(eq=False)
class Branch:
    """Sequences whose prompts begin with the same ``depth`` tokens, a multiple of the block size.

    Attributes:
        above: how many of these tokens the branch that it grows from has in common too.
        children: branches that share more, and sequences that share no more than ``depth`` with any other.
    """

    depth: int
    above: int = 0
    children: list[Branch | Sequence] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Sequence]:
        """All sequences of the branch, depth first, in the order of the children."""
        stack: list[Branch | Sequence] = [self]
        while stack:
            child = stack.pop()
            if isinstance(child, Branch):
                stack += reversed(child.children)
            else:
                yield child


def grow(sequences: List[Sequence], block_size: int) -> list[Branch]:
    """The branches of the tree over the tokens of ``sequences``, each before the one that it grows from; the last is
    the root, with depth 0. Only whole blocks count, since only they are shared.

    The prompts are sorted, and the tree follows from what neighbours share: the time grows with the total length of
    the prompts, and with n log n comparisons of them.
    """
    ordered = sorted(sequences, key=lambda sequence: (sequence.adapter.key, sequence.tokens))
    path, before = [Branch(0)], 0
    closed: list[Branch] = []
    for place, sequence in enumerate(ordered):
        after = _shared(sequence, ordered[place + 1], block_size) if place + 1 < len(ordered) else 0
        closed += _close(path, before)
        if after > path[-1].depth:
            path.append(Branch(after))
        path[-1].children.append(sequence)
        before = after
    return [*closed, *_close(path, 0), path[0]]


def _close(path: list[Branch], depth: int) -> Iterator[Branch]:
    """Ends the branches of ``path`` that are deeper than ``depth``, and hangs each on what it grows from."""
    while path[-1].depth > depth:
        done = path.pop()
        if path[-1].depth < depth:
            path.append(Branch(depth))
        done.above = path[-1].depth
        path[-1].children.append(done)
        yield done


def _shared(one: Sequence, other: Sequence, size: int) -> int:
    """How many of their first tokens two sequences share in whole blocks. The last token of either is not counted: it
    is computed in any case. With different adapters they share nothing."""
    a, b = one.tokens, other.tokens
    low, high = 0, (min(len(a), len(b)) - 1) // size if one.adapter.key == other.adapter.key else 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * size : middle * size] == b[low * size : middle * size]:
            low = middle
        else:
            high = middle - 1
    return low * size
