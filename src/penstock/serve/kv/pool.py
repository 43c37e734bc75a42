"""Blocks of the cache: reference counts, and a tree of the prefixes that they hold."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from penstock.core.errors import PenstockError

#: The node that every sequence starts from.
ROOT = 0


class Node(NamedTuple):
    """A full block in the prefix tree: ``key`` is (parent's id, the block's tokens), ``id`` is never used again."""

    key: tuple[int, tuple[int, ...]]
    id: int


class InvariantError(PenstockError):
    """The pool's books do not add up: a defect of the engine, never of a request."""


class BlockPool:
    """Hands out blocks. A block is *held* by one or more sequences, or *idle* (nobody holds it, but the tree knows
    what it holds, so that a later sequence can take it as it is), or *free*.

    The tree has a node per full block, reached from its parent's node by the block's tokens. Idle blocks are evicted
    in the order in which they became idle; a sequence lets go of its last block first, so a leaf goes before what
    leads to it.

    Args:
        blocks: how many there are.
        block_size: tokens of a block.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._holders = [0] * blocks
        self._once_each = dict.fromkeys(range(blocks), 1)
        self._free = deque(range(blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nodes: dict[int, Node] = {}
        self._tree: dict[tuple[int, tuple[int, ...]], int] = {}
        self._ids = ROOT

    @property
    def available(self) -> int:
        """How many blocks :meth:`take` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """How many blocks sequences hold."""
        return self.blocks - self.available

    def match(self, tokens: Sequence[int], count: int) -> list[int]:
        """The blocks of the longest known prefix within the first ``count`` tokens, in whole blocks.

        They are not held yet: :meth:`share` them before anything else is taken.
        """
        found: list[int] = []
        node, size = ROOT, self.block_size
        for start in range(0, count - size + 1, size):
            block = self._tree.get((node, tuple(tokens[start : start + size])))
            if block is None:
                break
            found.append(block)
            node = self._nodes[block].id
        return found

    def known(self, block: int) -> bool:
        """Whether ``block`` is in the tree."""
        return block in self._nodes

    def node_of(self, block: int | None) -> int:
        """The id of the tree's node at ``block``; the root's for None."""
        return ROOT if block is None else self._nodes[block].id

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` nobody holds: sharing them makes so many fewer available."""
        return sum(not self._holders[block] for block in blocks)

    def own_among(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` have a single holder: if that lets go of them, so many more are available."""
        return sum(self._holders[block] == 1 for block in blocks)

    def take(self, count: int) -> list[int]:
        """``count`` blocks with one holder each; there must be as many available."""
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._tree[self._nodes.pop(block).key]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of ``blocks``."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def frozen(self, block: int) -> bool:
        """Whether nobody may write to ``block``: several sequences hold it, or the tree says what it holds."""
        return self._holders[block] > 1 or block in self._nodes

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of ``blocks``, given in the order of their sequence."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._nodes:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def commit(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Puts a full ``block`` that holds ``tokens`` under the node ``parent``; returns its node's id.

        Where the tree has such a node already, the block stays out of it, and the node that is there is returned; a
        block that is in the tree already stays where it is.
        """
        key = (parent, tuple(tokens))
        known = self._tree.get(key, block)
        if known not in self._nodes:
            self._ids += 1
            self._tree[key] = block
            self._nodes[block] = Node(key, self._ids)
        return self._nodes[known].id

    def forget(self) -> None:
        """Empties the tree: idle blocks become free, and held ones will when they are released."""
        self._tree.clear()
        self._nodes.clear()
        self._free.extend(self._idle)
        self._idle.clear()

    def check(self, holdings: Iterable[Sequence[int]]) -> None:
        """Compares the books with ``holdings``, the blocks that each sequence says it holds.

        Raises:
            InvariantError: a block is lost, counted wrongly, or in two states at once.
        """
        counted = Counter(itertools.chain.from_iterable(holdings))
        held = {block: count for block, count in enumerate(self._holders) if count}
        if held != counted:
            block = next(block for block in held | counted if held.get(block, 0) != counted[block])
            raise InvariantError(
                f"block {block} counts {held.get(block, 0)} holders, and {counted[block]} sequences hold it"
            )
        free, idle = set(self._free), set(self._idle)
        states = Counter(itertools.chain(free, idle, held))
        if states != self._once_each:
            block = next(block for block in states | self._once_each if states[block] != self._once_each.get(block))
            raise InvariantError(f"block {block} is not in exactly one of the states free, idle and held")
        if unknown := idle - self._nodes.keys():
            raise InvariantError(f"block {min(unknown)} is idle, but the tree does not know what it holds")
        if len(free) != len(self._free) or len(self._tree) != len(self._nodes):
            raise InvariantError("the free list holds a block twice, or the tree and its nodes differ in number")
        for key, block in self._tree.items():  # looking keys up would hash the tokens of every block
            if block not in self._nodes or self._nodes[block].key != key:
                raise InvariantError(f"the tree does not lead to block {block}")
