"""What an engine needs of the one who computes for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from penstock.models.config import DecoderConfig
from penstock.serve.choose.sampler import Sampled
from penstock.serve.engine.batch import Batch


class Executor(Protocol):
    """Computes batches: a model with its cache, a simulation of one, or one who passes steps on to others."""

    @property
    def shape(self) -> DecoderConfig:
        """Of the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def blocks(self) -> int:
        """How many blocks of the cache sequences may use."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of the device's memory by what they are for, as far as it is known."""
        ...

    def launch(self, batch: Batch) -> Sampled | None:
        """Queues the work of ``batch``; what comes out is there once it was waited for. None where nothing does."""
        ...

    def close(self) -> None:
        """Nothing more will be launched: returns once what was launched has been computed, and written where it is to
        be."""
        ...
