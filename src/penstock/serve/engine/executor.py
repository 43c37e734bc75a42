"""What an engine needs of the one who computes for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.models.config import DecoderConfig
from penstock.serve.engine.batch import Awaited, Batch


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

    def launch(self, batch: Batch) -> Awaited | None:
        """Queues the work of ``batch``; what comes out is there once it was waited for. None where nothing does."""
        ...

    def close(self) -> None:
        """Nothing more will be launched: returns once what was launched has been computed, and written where it is to
        be."""
        ...


@runtime_checkable
class Compressing(Protocol):
    """An executor that may compress caches of sequences."""

    @property
    def compress_seconds(self) -> float:
        """How long the host was at it so far: on a CPU as long as it takes; on another device it is the time to queue
        the work, and whatever the host waits for meanwhile."""
        ...


@runtime_checkable
class Readable(Protocol):
    """An executor that has the whole model here."""

    def states(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The hidden states after the model's last norm of all tokens of ``texts``, float32 [tokens, hidden] each, on
        the CPU: computed now, from the beginning, beside the batches and without their cache.

        Raises:
            UsageError: the model is not here as a whole.
        """
        ...


@runtime_checkable
class Changeable(Protocol):
    """An executor whose model can take other weights, and leave the device for a while. What its cache held is lost
    with all of these."""

    def load(self, weights: Mapping[str, Tensor] | Path) -> None:
        """Puts ``weights``, by name or of a model's folder, in the place of the model's.

        Raises:
            UsageError, ModelError: they are not those of such a model. Nothing has changed then.
        """
        ...

    def sleep(self) -> None:
        """Frees the memory of the model and of the cache."""
        ...

    def wake(self) -> None:
        """Brings them back.

        Raises:
            PenstockError: the memory is not there any more, or the weights cannot be read again; it sleeps on.
        """
        ...
