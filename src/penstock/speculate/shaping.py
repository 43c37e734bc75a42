"""Trees of drafted tokens and probes, planned anew as it is learned what is accepted and what steps cost."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np

from penstock.speculate.sparse_tree import best_plan, ranks_of
from penstock.speculate.tree import Tree, depths, pruned

#: Steps after which trees are planned anew, at first, and most later on, when less is new: to plan takes as long as a
#: small step, or as some where trees are large.
STEPS, MOST_STEPS = 32, 512

#: What is thought of guesses of which nothing is known: how often the likeliest of the first depth is accepted, how
#: much less often that of a depth further on, and how many trials that counts for.
FIRST, DEEPER, TRIALS = 0.5, 0.8, 8.0

#: By what the weight of old trials is multiplied with each tree.
MEMORY = 0.998


class SparseTrees:
    """Shapes the trees of an engine's sequences; see :class:`~penstock.speculate.contract.Shaper`.

    Args:
        ahead: most tokens on a way.
        ranks: most drafts of a place.
        rows: most rows of a tree, probes among them.
    """

    def __init__(self, ahead: int, ranks: int, rows: int) -> None:
        # Of those that are tried where no likelier one was accepted, each is so less often than the one before.
        self._believed = TRIALS * FIRST * DEEPER ** np.arange(ahead)[:, None] / (1 + np.arange(ranks))
        self._tried, self._accepted = np.zeros((ahead, ranks)), np.zeros((ahead, ranks))
        self._rows = np.arange(rows + 1)
        self._trees: dict[int, tuple[Tree, ...]] = {}
        self._ahead, self._steps, self._patience = 0, 0, STEPS

    @property
    def acceptance(self) -> np.ndarray:
        """float64 [ahead, ranks], how likely the guess of each depth and rank is accepted if the one before it was."""
        rates = (self._accepted + self._believed) / (self._tried + TRIALS)
        left = np.cumprod(1 - rates, 1)
        found: np.ndarray = rates * np.hstack([np.ones((len(rates), 1)), left[:, :-1]])
        return found

    def plan(self, ahead: int, seconds: Callable[[np.ndarray], np.ndarray]) -> None:
        self._steps += 1
        if self._steps == self._patience:
            self._trees.clear()
            self._steps, self._patience = 0, min(2 * self._patience, MOST_STEPS)
        if ahead not in self._trees:
            self._trees[ahead] = best_plan(self.acceptance[:ahead], seconds(1 + self._rows)).trees
        self._ahead = ahead

    def shape(self, guessed: int) -> Tree:
        trees = self._trees[self._ahead]
        return trees[min(guessed, len(trees) - 1)]

    def learn(self, shape: Tree, way: List[int]) -> None:
        self._tried *= MEMORY
        self._accepted *= MEMORY
        ranks, on_way, over = ranks_of(shape.parents), set(way), set[int]()
        for node, (parent, depth) in enumerate(zip(shape.parents, depths(shape.parents), strict=True)):
            # Guesses behind a token that was not accepted were not tried, nor those beside a likelier one that was.
            if (parent < 0 or parent in on_way) and parent not in over:
                self._tried[depth - 1, ranks[node]] += 1
                if node in on_way:
                    self._accepted[depth - 1, ranks[node]] += 1
                    over.add(parent)


def fitting(tree: Tree, ahead: int, most: int) -> Tree:
    """``tree`` without what stands more than ``ahead`` tokens behind the newest one, probes among it, and of what is
    left the first nodes, up to ``most`` rows in all."""
    tall = depths(tree.parents)
    tree = pruned(tree, [node for node, depth in enumerate(tall) if depth <= ahead])
    tall = [0, *depths(tree.parents)]
    probes = [min(count, ahead - depth) for count, depth in zip(tree.probes, tall, strict=True)]
    kept = len(tree.tokens)
    while kept and kept + sum(probes[: kept + 1]) > most:
        kept -= 1  # the last of all has nothing behind it
    if not kept:
        probes[0] = min(probes[0], max(0, most))
    return Tree(tree.tokens[:kept], tree.parents[:kept], probes[: kept + 1])
