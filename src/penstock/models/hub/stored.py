"""The tensors of a folder by their names on disk, in whichever format they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.core.errors import ModelError
from penstock.models.formats.contract import GGUF_INDEX, Weights
from penstock.models.formats.renamed import Renamed
from penstock.models.formats.safetensors import Safetensors
from penstock.models.hub.folders import CONFIG
from penstock.models.hub.multimodal import tell, text_weight, wraps


def stored_in(folder: Path, raw: dict[str, Any]) -> Weights:
    """The weights of ``folder``, whose config.json holds ``raw``; of a model that sees pictures, those of its part for
    text, by the names that they have in a folder of that by itself.

    Raises:
        ModelError: a file is damaged, or the matrices are quantized in a way that is not supported.
    """
    weights = _as_stored(folder, raw)
    if not wraps(raw):
        return weights
    tell(folder)
    return Renamed(weights, text_weight)


def _as_stored(folder: Path, raw: dict[str, Any]) -> Weights:
    """All weights of ``folder`` by their own names."""
    if (folder / GGUF_INDEX).is_file():
        from penstock.models.formats.gguf import Gguf

        return Gguf(folder)
    config = raw.get("quantization_config")
    if not config:
        return Safetensors(folder)
    from penstock.models.formats.mxfp4 import Mxfp4
    from penstock.models.formats.quantized import Quantized, layout_of

    try:
        if isinstance(config, dict) and config.get("quant_method") == "mxfp4":
            return Mxfp4(Safetensors(folder))
        return Quantized(Safetensors(folder), layout_of(config))
    except ModelError as error:
        raise ModelError(f"{folder / CONFIG}: {error.what}", hint=error.hint) from error
