"""Trees of drafted tokens: several drafts for each place, of which one at most is accepted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from collections.abc import Sequence as List
from typing import NamedTuple

#: Most tokens of a tree: each is a row of the verifying step.
MOST = 256


class Tree(NamedTuple):
    """Drafted tokens, of which several may follow the same one.

    Attributes:
        tokens: of the text.
        parents: of each token the index of the one before it, which stands earlier; -1 for those behind the newest
            token of the text.
        probes: how many probes stand behind the newest token of the text, and behind each of the tree: rows of the step
            that are no tokens of any text, of which the last accepted token's say what is drafted next. Empty where
            there are none.
    """

    tokens: list[int]
    parents: list[int]
    probes: List[int] = ()

    @property
    def branched(self) -> bool:
        """Whether not all tokens are in a row."""
        return self.parents != list(range(-1, len(self.parents) - 1))

    @property
    def rows(self) -> int:
        """How many rows of a step it is."""
        return len(self.tokens) + sum(self.probes)


def chain(tokens: List[int]) -> Tree:
    """The tree of one branch."""
    return Tree(list(tokens), list(range(-1, len(tokens) - 1)))


def drafts_at(branches: List[int], depth: int) -> int:
    """How many drafts each place at ``depth`` 0 and more has: one behind the last of ``branches``."""
    return branches[depth] if depth < len(branches) else 1


def leaves(branches: List[int]) -> int:
    """How many ends a tree has that is full."""
    return math.prod(branches)


def full(branches: List[int], depth: int, most: int) -> list[int]:
    """The parents in the deepest full tree with up to ``depth`` tokens on each way and ``most`` in all, one generation
    behind the other."""
    parents: list[int] = []
    level: List[int] = [-1]
    for place in range(depth):
        drafts = drafts_at(branches, place)
        if len(parents) + len(level) * drafts > most:
            break
        first = len(parents)
        parents += [node for node in level for _ in range(drafts)]
        level = range(first, len(parents))
    return parents


def depths(parents: List[int]) -> list[int]:
    """How many tokens of the tree each has on its way, itself among them."""
    found: list[int] = []
    for parent in parents:
        found.append(1 + (found[parent] if parent >= 0 else 0))
    return found


def path(parents: List[int], node: int) -> list[int]:
    """The nodes from the first behind the newest token of the text to ``node``; none for -1."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


def pruned(tree: Tree, kept: Collection[int]) -> Tree:
    """``tree`` with none but the nodes that are ``kept``, the parents of each among them."""
    left = sorted(kept)
    number = {node: place for place, node in enumerate(left)} | {-1: -1}
    probes = [tree.probes[0], *(tree.probes[node + 1] for node in left)] if tree.probes else ()
    return Tree([tree.tokens[node] for node in left], [number[tree.parents[node]] for node in left], probes)


def way_of(tree: Tree, tokens: List[int]) -> list[int]:
    """The nodes that ``tokens`` are, one behind the other from the newest token of the text on."""
    way, node = [], -1
    for token in tokens:
        node = next(
            each
            for each in range(node + 1, len(tree.tokens))
            if tree.parents[each] == node and tree.tokens[each] == token
        )
        way.append(node)
    return way


def woven(texts: Iterator[List[int]], branches: List[int], most: int) -> Tree:
    """The tree of all ``texts``, the first whole, up to ``most`` tokens in all: what they begin with alike is there
    once, and a text ends where a place would have more drafts than ``branches`` say."""
    tree = Tree([], [])
    children: dict[int, dict[int, int]] = {}
    for text in texts:
        node = -1
        for depth, token in enumerate(text):
            known = children.setdefault(node, {})
            if token not in known:
                if len(known) == drafts_at(branches, depth) or len(tree.tokens) == most:
                    break
                known[token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
            node = known[token]
    return tree
