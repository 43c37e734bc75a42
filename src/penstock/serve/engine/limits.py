"""What an engine can hold."""

from __future__ import annotations

import dataclasses

from penstock.models.config import DecoderConfig
from penstock.ops.paged.residual import Residual
from penstock.ops.paged.selection import BlockSelection


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a step may hold, and for which model.

    Attributes:
        tokens: the token budget of a step.
        sequences: most sequences that run at a time.
        blocks: of the cache.
        block_size: tokens of a block.
        context: most tokens of a sequence.
        model: the shape of the model.
        selection: what tokens behind a prompt read of the cache; None where they read all.
        apart: whether contexts of requests are encoded apart, each from its own beginning.
        residual: the windows in full precision that sequences have; None where they have none.
    """

    tokens: int
    sequences: int
    blocks: int
    block_size: int
    context: int
    model: DecoderConfig
    selection: BlockSelection | None = None
    apart: bool = False
    residual: Residual | None = None
