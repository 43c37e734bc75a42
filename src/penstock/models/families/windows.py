"""Which layers have a sliding window, as config.json says it."""

from __future__ import annotations

from typing import Any

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def windows_from_hub(hub: HubConfig, usual: list[str], sliding: str = SLIDING) -> dict[str, Any]:
    """The window and its layers: those that ``layer_types`` names, else those of the ``usual`` kinds.

    Raises:
        ModelError: there are more or fewer kinds than layers, or one that is not known.
    """
    count, kinds = hub["num_hidden_layers"], hub["layer_types"] or usual
    if len(kinds) != count:
        raise ModelError(f"layer_types names {len(kinds)} layers of {count}")
    for kind in kinds:
        if kind not in (sliding, FULL):
            raise ModelError(f"the layer type {kind!r} is not supported", hint=f"Supported: {sliding}, {FULL}.")
    if hub["sliding_window"] is None:
        return {}
    return {"window": hub["sliding_window"], "windowed_layers": [i for i in range(count) if kinds[i] == sliding]}


def all_but_every(period: int, count: int) -> list[str]:
    """The kinds of ``count`` layers of which each ``period``-th sees everything (0: none does)."""
    return [SLIDING if not period or (layer + 1) % period else FULL for layer in range(count)]


def kinds_to_hub(config: DecoderConfig, sliding: str = SLIDING) -> list[str]:
    """``layer_types``."""
    return [FULL if config.window_of(layer) is None else sliding for layer in range(config.layers)]


def windows_to_hub(config: DecoderConfig) -> dict[str, Any]:
    """The keys that :func:`windows_from_hub` reads. transformers wants a window where no layer has one, too."""
    return {"sliding_window": config.window or config.context, "layer_types": kinds_to_hub(config)}
