"""Blocks of the cache: reference counts, and a tree of the prefixes that they hold."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from penstock.core.errors import PenstockError
from penstock.serve.kv.evictions.contract import Order, Tree
from penstock.serve.kv.evictions.lru import RecentOrder

#: The node that every sequence starts from whose keys and values are by the model alone; see :meth:`BlockPool.root`.
ROOT = 0


def name_behind(name: bytes, tokens: Iterable[int]) -> bytes:
    """A name for ``tokens`` behind a text that has a ``name``; the empty text's is the empty one. Two texts that are
    not equal have different names, as surely as a cryptographic hash tells."""
    return hashlib.blake2b(name + array("q", tokens).tobytes(), digest_size=16).digest()


def numbers_of(name: bytes) -> list[int]:
    """Two negative numbers, which are no tokens, that stand for a ``name`` among those of a block."""
    return [number | -(1 << 63) for number in array("q", name)]


class Node(NamedTuple):
    """A full block in the prefix tree: ``key`` is (parent's id, the block's tokens), ``id`` is never used again, and
    ``depth`` blocks lead to it."""

    key: tuple[int, tuple[int, ...]]
    id: int
    depth: int


class InvariantError(PenstockError):
    """The pool's books do not add up: a defect of the engine, never of a request."""


class BlockPool:
    """Hands out blocks. A block is *held* by one or more sequences, or *idle* (nobody holds it, but the tree knows
    what it holds, so that a later sequence can take it as it is), or *free*.

    The tree has a node per full block, reached from its parent's node by the block's tokens; the same tokens under
    another root are other blocks, whose keys and values were computed otherwise. A policy says in which
    order idle blocks are evicted. What an evicted block led to leaves the tree with it.

    Args:
        blocks: how many there are.
        block_size: tokens of a block.
        start: makes the order in which idle ones are evicted, of what is known of them: by default, the block that has
            been idle for the longest time goes first.

    Attributes:
        evicted: how many blocks were evicted so far.
        on_evict: called with each block before it is; what it holds is still there.
    """

    def __init__(self, blocks: int, block_size: int, start: Callable[[Tree], Order] = RecentOrder) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._holders = [0] * blocks
        self._once_each = dict.fromkeys(range(blocks), 1)
        self._free = deque(range(blocks))
        self._nodes: dict[int, Node] = {}
        self._tree: dict[tuple[int, tuple[int, ...]], int] = {}
        self._where: dict[int, int] = {}
        self._children, self._uses = [0] * blocks, [0] * blocks
        self._names: dict[int, bytes] = {}
        self._roots, self._root_names = {b"": ROOT}, {ROOT: b""}
        self._ids = ROOT
        self._start, self._idle = start, start(self)
        self.evicted = 0
        self.on_evict: Callable[[int], None] | None = None

    @property
    def available(self) -> int:
        """How many blocks :meth:`take` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """How many blocks sequences hold."""
        return self.blocks - self.available

    def root(self, name: bytes) -> int:
        """The node that texts start from whose keys and values depend on what has this ``name``; the empty one is that
        of the model alone."""
        if name not in self._roots:
            id = -len(self._roots)  # nodes have ids above that of the first root
            self._roots[name], self._root_names[id] = id, name
        return self._roots[name]

    def match(self, tokens: Sequence[int], count: int, root: int = ROOT) -> list[int]:
        """The blocks of the longest known prefix within the first ``count`` tokens, in whole blocks, from ``root`` on.

        They are not held yet: :meth:`share` them before anything else is taken.
        """
        size = self.block_size
        return self.follow((tokens[start : start + size] for start in range(0, count - size + 1, size)), root)

    def follow(self, pieces: Iterable[Sequence[int]], root: int = ROOT) -> list[int]:
        """The blocks that hold the first of these ``pieces`` of a text, one each, as far as they are known; the same
        holds for them."""
        found: list[int] = []
        node = root
        for tokens in pieces:
            block = self._tree.get((node, tuple(tokens)))
            if block is None:
                break
            found.append(block)
            node = self._nodes[block].id
        return found

    def known(self, block: int) -> bool:
        """Whether ``block`` is in the tree."""
        return block in self._nodes

    def node_of(self, block: int | None) -> int:
        """The id of the tree's node at ``block``; the first root's for None."""
        return ROOT if block is None else self._nodes[block].id

    # What a policy sees of blocks in the tree

    def parent(self, block: int) -> int | None:
        """The block that leads to ``block``; None of one that a text begins with."""
        return self._where.get(self._nodes[block].key[0])

    def depth(self, block: int) -> int:
        """How many blocks lead to ``block``."""
        return self._nodes[block].depth

    def uses(self, block: int) -> int:
        """How often a sequence began to hold ``block``, since it is in the tree."""
        return self._uses[block]

    def name(self, block: int) -> bytes:
        """A name for the tokens of ``block`` and all before them, which begin behind that of their root; see
        :func:`name_behind`."""
        chain: list[Node] = []
        here: int | None = block
        while here is not None and self._nodes[here].id not in self._names:
            chain.append(self._nodes[here])
            here = self.parent(here)
        name = self._root_names[chain[-1].key[0]] if here is None else self._names[self._nodes[here].id]
        for node in reversed(chain):
            name = self._names[node.id] = name_behind(name, node.key[1])
        return name

    # Taking and letting go

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
                block = self._idle.take()
                self.evicted += 1
                if self.on_evict is not None:
                    self.on_evict(block)
                self._cut(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def _cut(self, block: int) -> None:
        """Takes ``block``, which is not idle any more, out of the tree, and what it leads to: blocks that somebody
        holds who computed what ``block`` holds himself, and idle ones below those."""
        if self._children[block]:
            id = self._nodes[block].id
            for below in [each for each, node in self._nodes.items() if node.key[0] == id]:
                idle = below in self._idle
                if idle:
                    self._idle.remove(below)
                self._cut(below)
                if idle:
                    self._free.append(below)
        key, id, _ = self._nodes.pop(block)
        del self._tree[key], self._where[id]
        above = self._where.get(key[0])
        if above is not None:
            self._children[above] -= 1
        if self._names:
            self._names.pop(id, None)

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of ``blocks``."""
        for block in blocks:
            if not self._holders[block]:
                self._idle.remove(block)
            self._holders[block] += 1
            self._uses[block] += 1

    def frozen(self, block: int) -> bool:
        """Whether nobody may write to ``block``: several sequences hold it, or the tree says what it holds."""
        return self._holders[block] > 1 or block in self._nodes

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of ``blocks``, given in the order of their sequence."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._nodes:
                    self._idle.add(block)
                else:
                    self._free.append(block)

    def commit(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Puts a ``block`` that holds ``tokens`` under the node ``parent``; returns its node's id. Nobody will write to
        it, be it full or not. Numbers that are no tokens may stand for what the block depends on besides.

        Where the tree has such a node already, the block stays out of it, and the node that is there is returned; a
        block that is in the tree already stays where it is. Nothing hangs under a ``parent`` that is gone; it is
        returned.
        """
        key = (parent, tuple(tokens))
        known = self._tree.get(key, block)
        if known not in self._nodes:
            above = self._where.get(parent)
            if above is None and parent not in self._root_names:
                return parent
            depth = 0
            if above is not None:
                depth = self._nodes[above].depth + 1
                self._children[above] += 1
            self._ids = id = self._ids + 1
            self._tree[key] = self._where[id] = block
            self._nodes[block] = Node(key, id, depth)
            self._uses[block], self._children[block] = 1, 0
            return id
        return self._nodes[known].id

    def forget(self) -> None:
        """Empties the tree: idle blocks become free, and held ones will when they are released."""
        self._free.extend(self._idle)
        self._idle = self._start(self)
        for books in (self._tree, self._nodes, self._where, self._names):
            books.clear()

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
            if key[0] not in self._root_names and key[0] not in self._where:
                raise InvariantError(f"what leads to block {block} is not in the tree any more")
