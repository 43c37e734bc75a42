"""How a batch is shared among processes, and cut into the microbatches that one of them computes at a time."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

from penstock.core.errors import ConfigError
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows, rows_of
from penstock.train.config import BatchConfig

#: A part of a batch that is computed at a time, and which of its tokens see which.
Microbatch = tuple[Batch, CausalRows | PackedRows]


def rows_of_each(batch: BatchConfig, sharing: int, what: str) -> int:
    """The rows of a batch that each of ``sharing`` processes or pipelines gets.

    Raises:
        ConfigError: they cannot share it evenly.
    """
    rows = batch.tokens // batch.length
    if rows % sharing:
        raise ConfigError(
            f"{sharing} {what} cannot share {rows} rows of {batch.length} tokens evenly",
            hint=f"Make batch.tokens a multiple of {sharing * batch.length}.",
        )
    return rows // sharing


def microbatches(batch: Batch, length: int, tokens: int | None, device: torch.device) -> Iterator[Microbatch]:
    """``batch`` cut to sequences of ``length`` tokens, at most ``tokens`` (None: all) at a time, on ``device``."""
    whole = batch.each(lambda values: values.reshape(-1, length, *values.shape[2:]))
    share = tokens or whole.tokens.numel()
    rows = max(1, min(share // length, len(whole.tokens)))
    for start in range(0, len(whole.tokens), rows):
        micro = whole.each(operator.itemgetter(slice(start, start + rows)))
        # On the CPU the gain for whole rows is not worth compiling the loss a second time for them.
        context = rows_of(micro.documents) if device.type == "cuda" else PackedRows.of(micro.documents)
        yield micro.to(device), context.to(device)
