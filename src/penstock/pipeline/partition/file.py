"""The file that ``penstock pipeline partition`` writes and training reads, and the profile that it may be made from."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ConfigDict, Field

from penstock.core.config import Config, build
from penstock.core.errors import UsageError
from penstock.core.files import read_json
from penstock.pipeline.partition.pipedream import Layer, Stage
from penstock.pipeline.simulate.times import Times


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


class _Profile(Config):
    """What of a run's ``pipeline.json`` a partition needs."""

    model_config = ConfigDict(extra="ignore")

    times: Times
    message_bytes: float = Field(ge=0)


def measured_layers(path: Path) -> tuple[list[Layer], float]:
    """The embedding, the layers and the head as a run measured them, and bytes a second between its devices.

    Raises:
        UsageError: the file does not say what single layers took.
    """
    profile = build(_Profile, read_json(path), source=str(path))
    pieces, message = profile.times.pieces, profile.message_bytes
    if not pieces:
        raise UsageError(
            f"{path} does not say what each layer took",
            hint="A run with activation_checkpointing does not measure it: name the model in place of --costs.",
        )
    handed = [message] * (len(pieces) - 1) + [0.0]
    layers = [Layer(p.seconds, activation, p.weights) for p, activation in zip(pieces, handed, strict=True)]
    transfer = profile.times.transfer
    return layers, message / transfer if transfer else math.inf
