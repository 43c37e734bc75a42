"""Ministral 8B: Mistral with windows in some layers only."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import Lineage
from penstock.models.families.windows import all_but_every, windows_from_hub, windows_to_hub
from penstock.policy import policy


@policy("model.family", "ministral")
class Ministral(Lineage):
    """Ministral 8B."""

    architecture = "MinistralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {"sliding_window": 4096, "layer_types": None}
    example: ClassVar[dict[str, Any]] = {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return windows_from_hub(hub, all_but_every(0, hub["num_hidden_layers"]))

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return windows_to_hub(config)
