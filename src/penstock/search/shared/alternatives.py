"""Texts that take another token somewhere than the one that was drawn there."""

from __future__ import annotations

from penstock.search.branch import Branch


def turned(branch: Branch, place: int, token: int) -> Branch:
    """A fork of ``branch`` with ``token`` in ``place``, and nothing behind it; it has ended if that ends a text."""
    found = branch.fork(1, at=place)[0].append([token])
    if token in branch.search.voices[branch.model].ends:
        found.ended = "stop"
    return found
