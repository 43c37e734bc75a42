"""What an engine can hold."""

from __future__ import annotations

import dataclasses

from penstock.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a step may hold, and for which model.

    Attributes:
        tokens: the token budget of a step.
        sequences: most sequences that run at a time.
        blocks: of the cache.
        block_size: tokens of a block.
        model: the shape of the model.
    """

    tokens: int
    sequences: int
    blocks: int
    block_size: int
    model: DecoderConfig
