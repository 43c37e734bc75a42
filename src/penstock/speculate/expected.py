"""Tokens that a step of speculative decoding brings, from the probabilities that drafts are accepted."""

from __future__ import annotations


def chain_tokens(acceptance: float, drafts: int) -> float:
    """Tokens a step in the mean, where each of a chain of ``drafts`` is accepted with probability ``acceptance`` if all
    before it were: 1 + a + ... + a^k = (1 - a^(k + 1)) / (1 - a). The one behind the accepted ones is among them.

    With several drafts for each place, ``acceptance`` is that of the place and ``drafts`` the depth of the tree.
    """
    if acceptance == 1:
        return drafts + 1.0
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
