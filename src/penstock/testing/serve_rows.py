"""Sequences in slots and the sampler that chooses for them, without an engine or a model."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from penstock.serve.choose.asked import Asked
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.memory.held import Held
from penstock.serve.engine.sequence import Sequence
from penstock.serve.run.planner import Fields, Planner


class Rows:
    """What choosing needs of an engine.

    Args:
        slots: how many there are.
        vocabulary: how many tokens there are.
        device: of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.planner, self.sampler = Planner(slots, 1), Sampler(slots, vocabulary, device)
        self._sequences: dict[int, Sequence] = {}

    def add(self, slot: int, sequence: Sequence) -> None:
        """``sequence`` takes ``slot``."""
        self._sequences[slot] = sequence
        sequence.held = Held(slot)

    def entries(self, slots: List[int], counts: List[int], windows: List[tuple[int, ...]] | None = None) -> list[Entry]:
        """Those of a batch in which the sequences in ``slots`` go on, which have ``counts`` tokens after their prompts
        and, behind those, the tentative ones of ``windows``."""
        entries = []
        for place, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            sequence, window = self._sequences[slot], windows[place] if windows else ()
            width = 1 + len(window)
            entries.append(Entry(sequence, slot, sequence.prompt + count - 1, width, width, window=window))
        return entries

    def ask(self, slots: List[int], counts: List[int], windows: List[tuple[int, ...]] | None = None) -> Asked:
        """What the sequences of such :meth:`entries` want."""
        return self.asked(self.entries(slots, counts, windows))

    def asked(self, entries: list[Entry]) -> Asked:
        """What the sequences of ``entries`` want."""
        placed, asked = self.planner.ask(entries, Fields.of(entries))
        for each in placed:
            self.sampler.place(each.slot, each.tokens, each.prompt)
        return asked

    def sample(self, logits: Tensor, asked: Asked) -> Sampled:
        """The next tokens."""
        return self.sampler.sample(logits, asked)[0]
