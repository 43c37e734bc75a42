"""The part of a batch that lets everybody who runs go on."""

from __future__ import annotations

from collections.abc import Sequence as List

from penstock.serve.batching.contract import Room
from penstock.serve.engine.sequence import Sequence


def go_on(running: List[Sequence], room: Room) -> None:
    """Takes all that decode, so that none of them stalls, then pieces of the prompts under way (Sarathi-Serve)."""
    prompts = []
    for sequence in running:
        if sequence.decoding:
            room.take(sequence)
        else:
            prompts.append(sequence)
    for sequence in prompts:
        if room.tokens:
            room.take(sequence)
