"""Validation while a run is under way: some held-out documents every so many updates, and the best weights so far."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from penstock.data.store import Split
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.train.config import ValidationConfig
from penstock.train.evaluate import Sample, bits_per_byte
from penstock.train.precision import Weights


def beginning_of(split: Split, tokens: int) -> Sample:
    """The first documents of a split, up to ``tokens`` in all, but at least one. They lie in pseudo-random order."""
    numbers: list[int] = []
    total = 0
    for number in range(split.documents):
        length = split.length(number)
        if numbers and total + length > tokens:
            break
        numbers.append(number)
        total += length
    return Sample(split, numbers)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Measures a model in training, on the same documents each time.

    Attributes:
        config: when, and how much.
        documents: the held-out ones that are measured.
        window: tokens that the model sees at a time.
        world: all processes take part; the leading one measures.
    """

    config: ValidationConfig
    documents: Sample
    window: int
    world: World

    def due(self, step: int) -> bool:
        """Whether update ``step`` is followed by a validation."""
        return bool(self.config.every and self.documents.documents and step % self.config.every == 0)

    def measure(self, whole: Decoder | None, weights: Weights, device: torch.device) -> float:
        """Bits per byte of the weights as they are, without average; ``whole`` is the model in the leading process."""
        measured = 0.0
        if whole is not None:
            arithmetic = weights.arithmetic(device) if device.type == "cuda" else contextlib.nullcontext()
            there = whole.embedding.weight.device
            with arithmetic:
                measured = bits_per_byte(whole.to(device), self.documents, window=self.window)
            whole.to(there)
        return self.world.largest(measured)[0]
