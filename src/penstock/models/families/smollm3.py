"""SmolLM3: Llama without rotation in every fourth layer."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.llama import Llama
from penstock.models.families.windows import FULL, SLIDING, kinds_to_hub, windows_from_hub
from penstock.policy import policy


def unrotated_from_hub(hub: HubConfig) -> list[int]:
    """The layers without rotation: ``no_rope_layers`` has a 1 for those that have one; else every so many has none."""
    period, count = hub["no_rope_layer_interval"], hub["num_hidden_layers"]
    rotated = hub["no_rope_layers"] or [int((layer + 1) % period != 0) for layer in range(count)]
    return [layer for layer in range(count) if not rotated[layer]]


def unrotated_to_hub(config: DecoderConfig) -> dict[str, Any]:
    """Its key."""
    return {"no_rope_layers": [int(config.rope_of(layer) is not None) for layer in range(config.layers)]}


@policy("model.family", "smollm3")
class SmolLM3(Llama):
    """SmolLM3 3B."""

    architecture = "SmolLM3ForCausalLM"
    rank = 0
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    }
    example: ClassVar[dict[str, Any]] = {
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        unrotated, count = unrotated_from_hub(hub), hub["num_hidden_layers"]
        usual = [SLIDING if layer in unrotated else FULL for layer in range(count)]
        windows = windows_from_hub(hub, usual) if hub["use_sliding_window"] else {}
        return {"unrotated_layers": unrotated, **windows}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        kinds = kinds_to_hub(config)
        return {
            **unrotated_to_hub(config),
            "use_sliding_window": SLIDING in kinds,
            "sliding_window": config.window,
            "layer_types": kinds,
        }
