"""Tokens that a step of speculative decoding brings, from the probabilities that drafts are accepted."""

from __future__ import annotations

from collections.abc import Sequence


def chain_tokens(acceptance: float, drafts: int) -> float:
    """Tokens a step in the mean, where each of a chain of ``drafts`` is accepted with probability ``acceptance`` if all
    before it were: 1 + a + ... + a^k = (1 - a^(k + 1)) / (1 - a). The one behind the accepted ones is among them.

    With several drafts for each place, ``acceptance`` is that of the place and ``drafts`` the depth of the tree.
    """
    if acceptance == 1:
        return drafts + 1.0
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def tree_tokens(parents: Sequence[int], acceptance: Sequence[float]) -> float:
    """Tokens a step in the mean of a tree of drafts: 1 and, for each node, the product of the acceptances on its way.

    Args:
        parents: of each node the index of its parent, which stands before it; -1 for those behind the newest token.
        acceptance: of each node, the probability that it is accepted if its parent was. Siblings exclude each other.

    Raises:
        ValueError: a parent does not stand before its child, or siblings are accepted with more than 1 together.
    """
    reached: list[float] = []
    shares: dict[int, float] = {}
    for node, (parent, chance) in enumerate(zip(parents, acceptance, strict=True)):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} has the parent {parent}, which does not stand before it")
        shares[parent] = shares.get(parent, 0.0) + chance
        if shares[parent] > 1 + 1e-9:
            raise ValueError(f"the nodes behind {parent} are accepted with {shares[parent]:.3g} together, more than 1")
        reached.append(chance * (reached[parent] if parent >= 0 else 1.0))
    return 1 + sum(reached)
