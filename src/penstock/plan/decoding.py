"""What a decoding step costs, as a roofline."""

from __future__ import annotations

import dataclasses

from penstock.models.config import DecoderConfig
from penstock.plan.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class DecodeCost:
    """One step in which each of a batch's sequences gains a token: it takes the longer of its arithmetic at the
    device's peak, and of reading all weights once and each sequence's keys and values at full bandwidth.

    Attributes:
        hardware: the device.
        weights: bytes of the weights.
        cache: bytes of keys and values for a sequence, at its average length.
        flops: of a token at that length.
        reserve: share of the memory that is kept free, for activations and the like.
    """

    hardware: Hardware
    weights: float
    cache: float
    flops: float
    reserve: float = 0.1

    @classmethod
    def of(cls, model: DecoderConfig, hardware: Hardware, length: int, width: int = 2) -> DecodeCost:
        """For ``model`` with numbers of ``width`` bytes and sequences that hold ``length`` tokens on average. Of a
        sparse block all experts are read, as large batches do. Windows cut what a token looks at, and what is held
        for it is counted whole, as the engine holds it."""
        kept = [min(model.window_of(layer) or length, length) for layer in range(model.layers)]
        return cls(
            hardware,
            weights=width * model.stored_parameters(),
            cache=width * model.layers * model.kept * length,
            flops=2 * model.matmul_parameters() + model.pair_flops * sum(kept),
        )

    def seconds(self, batch: int) -> float:
        """Of a step with ``batch`` sequences."""
        moved = self.weights + batch * self.cache
        return max(batch * self.flops / self.hardware.flops, moved / self.hardware.bandwidth)

    def bytes(self, batch: int) -> float:
        """Memory that weights and cache take."""
        return self.weights + batch * self.cache

    @property
    def usable(self) -> float:
        """Memory for weights and cache, in bytes."""
        return (1 - self.reserve) * self.hardware.memory

    @property
    def largest(self) -> int:
        """The largest batch whose cache there is memory for; 0 where not even one sequence fits."""
        return max(0, int((self.usable - self.weights) // self.cache))
