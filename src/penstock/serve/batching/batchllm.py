"""Global prefix sharing for batches that are known beforehand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import ClassVar

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.prefix_tree import Branch, grow
from penstock.serve.batching.stall_free import go_on
from penstock.serve.batching.waves import WavesBatcher
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class BatchLLMBatcher(WavesBatcher):
    """See :class:`BatchLLM`."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(functools.partial(schedule, block_size=limits.block_size))

    def form(self, running: List[Sequence], room: Room) -> None:
        go_on(running, room)
        while room.tokens and (first := self._waves.first()) is not None and room.take(first):
            self._waves.remove(first)


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences that all begin with the same ``shared`` tokens."""

    members: list[Sequence]
    shared: int

    @property
    def decode_ratio(self) -> float:
        """Tokens that the group decodes at most, for each token that it computes before, the common ones once. What
        others have generated already, forks and those that were preempted, they have to compute too."""
        decoded = sum(sequence.limit - len(sequence.tokens) for sequence in self.members)
        return decoded / (self.shared + sum(len(sequence.tokens) - self.shared for sequence in self.members))


def schedule(sequences: List[Sequence], block_size: int) -> Iterator[Sequence]:
    """``sequences`` in groups that share a prefix, those with the largest share of decoding first."""
    for chosen in sorted(group(sequences, block_size), key=lambda each: each.decode_ratio, reverse=True):
        yield from chosen.members


def group(sequences: List[Sequence], block_size: int) -> list[Group]:
    """Splits ``sequences`` into groups of one level that save as many tokens as they can: members less one, times
    what they all begin with.

    A branch of the prefix tree either makes a group, or leaves what grows from it alone; a branch that grows from it
    joins its group as a whole, where more is saved so, or not at all. Among such splits this is the best, found from
    the leaves of the tree to its root.
    """
    tree = grow(sequences, block_size)
    saved: dict[Branch, int] = {}
    count: dict[Branch, int] = {}
    joined: dict[Branch, bool] = {}
    for branch in tree:
        below = [child for child in branch.children if isinstance(child, Branch)]
        leaves = len(branch.children) - len(below)
        count[branch] = leaves + sum(count[child] for child in below)
        apart = sum(saved[child] for child in below)
        together = branch.depth * (leaves - 1) + sum(max(saved[child], count[child] * branch.depth) for child in below)
        saved[branch], joined[branch] = max((apart, False), (together, True))
    groups, stack = [], [tree[-1]]
    while stack:
        branch = stack.pop()
        members: list[Sequence] = []
        for child in branch.children:
            if not isinstance(child, Branch):
                members.append(child)
            elif joined[branch] and count[child] * branch.depth >= saved[child]:
                members += child.walk()
            else:
                stack.append(child)
        parts = [members] if joined[branch] else [[member] for member in members]
        groups += [Group(part, branch.depth if joined[branch] else 0) for part in parts if part]
    return groups


@policy("serve.batching", "batchllm", papers=[235])
class BatchLLM(Batching):
    """Prompts that share a prefix go in together, groups that decode most go first, and a step is filled as far as the
    cache has room (BatchLLM). For work that is known beforehand; see :class:`~.waves.Waves` for what arrives later.

    From the paper: the prefix tree over all prompts, groups of one level that are enlarged by dynamic programming,
    their order by the ratio of decoding to prefilling, so that decodes mix with the prompts that come later, and
    batches bounded by memory and not by a number of requests (set ``sequences`` high). Ours: the recursion itself,
    ``max_tokens`` as the expected number of decoded tokens, and that the shared blocks lie in the engine's prefix
    cache, where the group keeps them alive, instead of being freed by hand.
    """

    fair: ClassVar[bool] = False

    def start(self, limits: Limits) -> Batcher:
        return BatchLLMBatcher(limits)
