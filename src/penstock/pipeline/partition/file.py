"""The file that ``penstock pipeline partition`` writes, and training reads."""

from __future__ import annotations

from pydantic import Field

from penstock.core.config import Config
from penstock.pipeline.partition.pipedream import Layer, Stage


class PartitionFile(Config):
    """A partition, beside the profile that it was made from.

    Attributes:
        layers: by name, the embedding, the layers and the head; stages count them in this order.
        stages: in order.
        seconds: between two minibatches in the steady state.
    """

    layers: dict[str, Layer]
    stages: tuple[Stage, ...] = Field(min_length=1)
    seconds: float
