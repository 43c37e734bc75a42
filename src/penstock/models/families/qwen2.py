"""Qwen2: biases on queries, keys and values, and sliding windows in some layers."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import Lineage
from penstock.models.families.windows import FULL, SLIDING, kinds_to_hub, windows_from_hub
from penstock.policy import policy

LAST_WINDOWS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def last_windows_from_hub(hub: HubConfig) -> dict[str, Any]:
    """The window and its layers: those that ``layer_types`` names, or else all from ``max_window_layers`` on."""
    if not hub["use_sliding_window"]:
        return {}
    first, count = hub["max_window_layers"], hub["num_hidden_layers"]
    return windows_from_hub(hub, [SLIDING if layer >= first else FULL for layer in range(count)])


def last_windows_to_hub(config: DecoderConfig) -> dict[str, Any]:
    """Both ways of saying which layers are windowed; ``max_window_layers`` is exact where those are the last ones."""
    kinds = kinds_to_hub(config)
    return {
        "use_sliding_window": SLIDING in kinds,
        "sliding_window": config.window,
        "max_window_layers": (*kinds, SLIDING).index(SLIDING),
        "layer_types": kinds,
    }


@policy("model.family", "qwen2")
class Qwen2(Lineage):
    """Qwen 1.5, 2 and 2.5, dense."""

    architecture = "Qwen2ForCausalLM"
    rank = 3
    fixed: ClassVar[dict[str, Any]] = {"qkv_bias": True}
    defaults: ClassVar[dict[str, Any]] = LAST_WINDOWS
    example: ClassVar[dict[str, Any]] = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return last_windows_from_hub(hub)

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return last_windows_to_hub(config)
