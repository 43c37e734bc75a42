"""Models whose weights are read from disk as they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from penstock.core.errors import UsageError
from penstock.models.adapters.folder import INDEX as ADAPTER_INDEX
from penstock.models.blank import without_weights
from penstock.models.decoder import Decoder, Layer
from penstock.models.families.mapping import placed, views_on
from penstock.models.formats.contract import GGUF_INDEX
from penstock.models.hub.description import Description, describe
from penstock.models.hub.family import remember
from penstock.models.hub.filling import allocate, fill
from penstock.models.hub.folders import resolve
from penstock.models.hub.weights import check_weights, stated_dtype, weights_of
from penstock.models.streamed import first_that_stay, stored_layers, stream_layers


def load_streamed(source: str | Path, resident: int, *, dtype: torch.dtype | None = None) -> Decoder:
    """Loads a model for inference on a CPU, of whose weights no more than ``resident`` bytes are in memory at a time.
    What does not fit is read anew in each pass (:mod:`penstock.models.streamed`); the files have to stay as they are.
    A model that fits is loaded whole.

    Raises:
        UsageError: as :func:`~penstock.models.hub.load`; or the budget is too small for any layer, or the weights are
            not stored as plain numbers.
        ModelError: as :func:`~penstock.models.hub.load`.
    """
    described = describe(resolve(source))
    _refuse_unstreamable(described)
    family, weights = described.family, weights_of(described)
    with without_weights():
        decoder = Decoder(described.config)
    check_weights(described, weights, views_on(decoder, family))
    dtype = dtype or stated_dtype(described, weights)
    stored = stored_layers(decoder, placed(decoder, family), weights.headers, dtype)
    layers = decoder.layers.to(dtype)
    others = decoder.parameter_count() - sum(each.numel() for each in layers.parameters())
    stay = first_that_stay(stored, others * dtype.itemsize, resident)
    decoder.layers = layers[:stay]
    allocate(decoder, torch.device("cpu"), dtype)
    fill(decoder, family, weights)
    if stay < len(stored):
        stream_layers(decoder, [cast(Layer, each) for each in layers[stay:]], stored[stay:])
    remember(decoder, described)
    return decoder.requires_grad_(False)


def _refuse_unstreamable(described: Description) -> None:
    """Refuses weights that are not stored as plain numbers, each where it is used."""
    folder = described.folder
    coded = {
        "it is a GGUF file": (folder / GGUF_INDEX).is_file(),
        "its matrices are quantized": bool(described.raw.get("quantization_config")),
        "it is an adapter over a base": (folder / ADAPTER_INDEX).is_file(),
    }
    for reason, holds in coded.items():
        if holds:
            raise UsageError(
                f"the layers of {folder} cannot be read from disk as they are needed: {reason}",
                hint="Leave out resident_weights, or name a folder with plain safetensors.",
            )
