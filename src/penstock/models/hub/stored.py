"""The tensors of a folder by their names on disk, in whichever format they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.core.errors import ModelError
from penstock.models.formats.contract import GGUF_INDEX, Weights
from penstock.models.formats.safetensors import Safetensors
from penstock.models.hub.folders import CONFIG


def stored_in(folder: Path, raw: dict[str, Any]) -> Weights:
    """The weights of ``folder``, whose config.json holds ``raw``.

    Raises:
        ModelError: a file is damaged, or the matrices are quantized in a way that is not supported.
    """
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
