"""Models that see pictures, whose part for text is one of the families: that part is read, and nothing else."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The ``model_type`` of those whose part for text computes as it does by itself where there is no picture.
WRAPPERS = ("gemma3", "llama4", "mistral3")

#: The key of config.json under which the part for text is described.
TEXT = "text_config"

#: Keys of the whole that count for the part, where they are there.
SHARED = (
    "architectures",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

#: The modules beside the language model; since transformers 4.52 some folders have all of them below ``model``.
_BESIDE = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")

log = logging.getLogger(__name__)


def wraps(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of such a model."""
    return raw.get("model_type") in WRAPPERS and isinstance(raw.get(TEXT), dict)


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json as those of the part for text by itself; unchanged where there is no other."""
    if not wraps(raw):
        return raw
    shared = {key: raw[key] for key in SHARED if raw.get(key) is not None}
    return {**raw[TEXT], **shared}


def text_weight(name: str) -> str | None:
    """What a tensor of such a folder is called in one of the part for text; None where it is of no such part."""
    if _BESIDE.match(name):
        return None
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "model.", 1)
    return name.removeprefix("language_model.")


@functools.cache
def tell(folder: Path) -> None:
    """Says once that pictures are left out."""
    log.warning("%s: only the part for text is read; images are not supported", folder)
