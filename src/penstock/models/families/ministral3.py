"""Ministral 3: Mistral with YaRN, and queries that grow with their position."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.mistral import Mistral
from penstock.models.families.rope import rope_to_hub
from penstock.policy import policy

#: Beside the scaling of the rotation.
GROWTH, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"


@policy("model.family", "ministral3")
class Ministral3(Mistral):
    """Ministral 3: 3B, 8B and 14B; the part for text."""

    architecture = "Ministral3ForCausalLM"
    rank = 0
    defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_theta": 1_000_000.0,
    }
    example: ClassVar[dict[str, Any]] = {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            ORIGINAL: 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            GROWTH: 0.3,
        },
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        found = hub.get("rope_scaling") or hub.get("rope_parameters") or {}
        if not found.get(GROWTH):
            return {}
        return {"temperature": {"scale": found[GROWTH], "span": found.get(ORIGINAL, hub["max_position_embeddings"])}}

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        keys, growth = rope_to_hub(config.rope), config.temperature
        scaling = keys["rope_scaling"] or {"rope_type": "default"}
        span = growth.span if growth else scaling.get(ORIGINAL, config.context)
        return keys | {"rope_scaling": {**scaling, GROWTH: growth.scale if growth else 0.0, ORIGINAL: span}}
