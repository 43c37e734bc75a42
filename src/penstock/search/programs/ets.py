"""ETS: the leaves that go on are chosen for reward, shared blocks and diversity at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from scipy.optimize import Bounds, LinearConstraint, milp

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.allotting import prune, rebase


@policy("search.program", "ets", papers=[321])
class EfficientTreeSearch(Program):
    """Tree search step by step in which an integer program chooses the leaves that go on: it maximises the share of
    their REBASE weight that is kept, less ``sharing`` times the share of the tree's nodes that they need (the cache
    that they hold), plus ``diversity`` times the share of clusters of alike steps that they cover. The ``width`` is
    shared out among those in proportion to their weight.

    From the paper: the objective; REBASE below it. Ours: clusters are steps that say the same but for digits, case and
    blanks, where the paper embeds them.

    Attributes:
        width: leaves at a time.
        sharing: lambda_b, the price of nodes.
        diversity: lambda_d, the worth of clusters.
        temperature: of the scores.
        steps: at most.
    """

    width: PositiveInt = 8
    sharing: NonNegativeFloat = 1.0
    diversity: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 0.2
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        ended: list[Branch] = []
        leaves = search.root.fork(self.width)
        for _ in range(self.steps):
            await search.judge(await search.extend(leaves, step=True))
            ended += [each for each in leaves if each.finished]
            leaves = [each for each in leaves if not each.finished]
            width = self.width - len(ended)
            if not leaves or width < 1 or search.exhausted:
                break
            counts = rebase([each.worth for each in leaves], width, self.temperature)
            nodes = [{node.number for node in [*leaf.ancestors, leaf]} for leaf in leaves]
            clusters = [_cluster(each.last) for each in leaves]
            chosen = await search.work(select, counts, nodes, clusters, self.sharing, self.diversity)
            kept = [leaves[place] for place in chosen]
            prune(leaves, kept)
            counts = rebase([each.worth for each in kept], width, self.temperature)
            leaves = [child for each, count in zip(kept, counts, strict=True) for child in each.fork(count)]
        return search.best([*ended, *leaves])

    @classmethod
    def limit(cls) -> Program:
        return cls(width=1)


def _cluster(step: str) -> str:
    return "".join(letter for letter in step.lower() if not letter.isspace() and not letter.isdigit())


def worth(
    chosen: Sequence[int],
    weights: Sequence[float],
    nodes: Sequence[set[int]],
    clusters: Sequence[str],
    sharing: float,
    diversity: float,
) -> float:
    """What the leaves ``chosen`` are worth together."""
    needed = set().union(*(nodes[place] for place in chosen))
    covered = {clusters[place] for place in chosen}
    kept = sum(weights[place] for place in chosen) / (sum(weights) or 1.0)
    return kept - sharing * len(needed) / len(set().union(*nodes)) + diversity * len(covered) / len(set(clusters))


def select(
    weights: Sequence[float], nodes: Sequence[set[int]], clusters: Sequence[str], sharing: float, diversity: float
) -> list[int]:
    """The leaves, at least one, that are worth most together, by an integer program: a variable for each leaf, each
    node, and each cluster.

    Args:
        weights: of each leaf.
        nodes: that each leaf needs, its ancestors and itself.
        clusters: to which each leaf belongs.
    """
    all_nodes, all_clusters = sorted(set().union(*nodes)), sorted(set(clusters))
    leaves, width = len(weights), len(weights) + len(all_nodes) + len(all_clusters)
    gains = np.zeros(width)
    gains[:leaves] = np.array(weights, float) / (sum(weights) or 1.0)
    gains[leaves : leaves + len(all_nodes)] = -sharing / len(all_nodes)
    gains[leaves + len(all_nodes) :] = diversity / len(all_clusters)
    rows, low = [np.zeros(width)], [1.0]
    rows[0][:leaves] = 1  # at least one leaf
    for leaf, needed in enumerate(nodes):
        for node in needed:  # a leaf needs its nodes
            row = np.zeros(width)
            row[leaves + all_nodes.index(node)], row[leaf] = 1, -1
            rows.append(row)
            low.append(0.0)
    for place, cluster in enumerate(all_clusters):  # a cluster is covered by a leaf of it
        row = np.zeros(width)
        row[[leaf for leaf, own in enumerate(clusters) if own == cluster]] = 1
        row[leaves + len(all_nodes) + place] = -1
        rows.append(row)
        low.append(0.0)
    found = milp(
        -gains, constraints=LinearConstraint(np.array(rows), low), integrality=np.ones(width), bounds=Bounds(0, 1)
    )
    return [place for place in range(leaves) if found.x[place] > 0.5]
