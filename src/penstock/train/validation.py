"""Validation while a run is under way: some held-out documents every so many updates, and the best weights so far."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import ClassVar, Protocol

import torch

from penstock.data.store import Split
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.train.config import ValidationConfig
from penstock.train.evaluate import Sample
from penstock.train.precision import Weights


class Validated(Protocol):
    """What :class:`~penstock.train.material.contract.Material` tells of."""

    measure: ClassVar[str]

    @property
    def held_out(self) -> int: ...

    def validate(self, model: Decoder) -> float: ...


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
    """Measures a model in training, on the same held-out documents or examples each time.

    Attributes:
        config: when.
        material: of the run.
        world: all processes take part; the leading one measures.
    """

    config: ValidationConfig
    material: Validated
    world: World

    def due(self, step: int) -> bool:
        """Whether update ``step`` is followed by a validation."""
        return bool(self.config.every and self.material.held_out and step % self.config.every == 0)

    def measure(self, whole: Decoder | None, weights: Weights, device: torch.device) -> float:
        """The measure of the weights as they are, without average; ``whole`` is the model in the leading process."""
        measured = 0.0
        if whole is not None:
            arithmetic = weights.arithmetic(device) if device.type == "cuda" else contextlib.nullcontext()
            there = whole.like.device
            with arithmetic:
                measured = self.material.validate(whole.to(device))
            whole.to(there)
        return self.world.largest(measured)[0]
