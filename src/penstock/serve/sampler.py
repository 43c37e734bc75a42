"""Choosing the next tokens of many sequences at once, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

from penstock.core.randomness import derive, uniforms
from penstock.models.sampling import draw, probabilities_of
from penstock.serve.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What was chosen: ``tokens`` int64 [R] on the device."""

    tokens: Tensor


class Sampler:
    """Chooses tokens for the sequences in the runner's slots.

    Args:
        slots: how many there are.
        device: of the logits.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._keys = np.zeros(slots, np.uint64)
        self._temperature = np.ones(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)

    def add(self, slot: int, sampling: SamplingParams) -> None:
        """A sequence takes ``slot``."""
        self._keys[slot] = derive(sampling.seed, "sample")
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k or 0
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p

    def sample(self, logits: Tensor, slots: List[int], counts: List[int]) -> Sampled:
        """The next tokens, given ``logits`` [R, V] of the sequences in ``slots`` [R], which have ``counts`` [R] tokens
        after their prompts already. The draw depends on the sequence's seed and its count alone."""
        rows = np.asarray(slots)
        temperature = self._temperature[rows]
        if not temperature.any():
            return Sampled(logits.argmax(-1))
        chances = probabilities_of(
            logits.float(),
            temperature=self._of(temperature),
            top_k=self._of(self._top_k[rows]) if self._top_k[rows].any() else None,
            top_p=self._of(self._top_p[rows]) if (self._top_p[rows] < 1).any() else None,
            min_p=self._of(self._min_p[rows]) if self._min_p[rows].any() else None,
        )
        return Sampled(draw(chances, self._of(uniforms(self._keys[rows], np.asarray(counts)))))

    def _of(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, non_blocking=True)
