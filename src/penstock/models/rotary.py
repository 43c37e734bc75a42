"""Rotary position embedding (RoFormer, Su et al. 2021) with linear, Llama-3, YaRN and LongRoPE scaling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.models.config import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from penstock.ops.rotary import Rotation

#: Cosines and sines of tokens, each [*T, 1, turned / 2], for each of a model's rotary embeddings.
Turns = tuple[tuple[Tensor, Tensor], ...]


class Rotary(nn.Module):
    """Cosines and sines for positions. The frequencies stay float32 whatever the model is cast to.

    Args:
        rope: the embedding.
        turned: how many numbers of a head it turns.
        context: the longest text, which LongRoPE asks for.
    """

    frequencies: Tensor

    def __init__(self, rope: RopeConfig, turned: int, context: int) -> None:
        super().__init__()
        # Real memory even under a meta device: loading fills parameters only.
        with torch.device("cpu"):
            frequencies, self.magnitude = scaled_frequencies(rope, turned, context)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        kept = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        target = self.frequencies.device
        self.frequencies = kept if target.type == "meta" else kept.to(target)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [*T, 1, turned / 2] in ``dtype``, for ``positions`` [*T]."""
        angles = positions.unsqueeze(-1).float() * self.frequencies
        cos, sin = (turn * self.magnitude for turn in self.turns(angles))
        return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)

    def turns(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines of ``angles``."""
        return angles.cos(), angles.sin()


class Rotaries(nn.ModuleList):
    """The rotary embeddings of a model, in the order of ``config.ropes``, for texts of up to ``context`` tokens."""

    def __init__(self, config: DecoderConfig, context: int) -> None:
        super().__init__(Rotary(rope, config.rotated_of(rope), context) for rope in config.ropes)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Turns:
        """What each gives for ``positions`` [*T]."""
        return tuple(rotary(positions, dtype) for rotary in self)


def rotations(config: DecoderConfig) -> tuple[Rotation | None, ...]:
    """What turns the keys of each layer, for texts of up to ``config.context`` tokens; None where nothing does."""
    ropes = (config.rope_of(layer) for layer in range(config.layers))
    return tuple(None if rope is None else _rotation(config, rope) for rope in ropes)


def _rotation(config: DecoderConfig, rope: RopeConfig) -> Rotation:
    frequencies, magnitude = scaled_frequencies(rope, config.rotated_of(rope), config.context)
    return Rotation(frequencies, magnitude, rope.interleaved)


def scaled_frequencies(rope: RopeConfig, dim: int, context: int) -> tuple[Tensor, float]:
    """Angular frequencies, float32 [dim / 2], and the factor on cosines and sines, for texts of up to ``context``."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.scaling:
        case LinearScaling(factor=factor):
            return frequencies / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(frequencies, rope.theta, dim, scaling), _yarn_magnitude(scaling)
        case LongRopeScaling() as scaling:
            factors = scaling.long if context > scaling.original_context else scaling.short
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents), scaling.attention_factor
        case _:
            return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_context / scaling.low_frequency_factor
    high = scaling.original_context / scaling.high_frequency_factor
    ramp = (scaling.original_context / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    mixed = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    slow = torch.where(wavelength > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelength <= low) & (wavelength >= high), mixed, slow)


def _yarn(frequencies: Tensor, theta: float, dim: int, scaling: YarnScaling) -> Tensor:
    def dimension_of(rotations: float) -> float:
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _yarn_magnitude(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    return yarn_magnitude(scaling.factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN makes queries, or keys, larger where positions are stretched by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
