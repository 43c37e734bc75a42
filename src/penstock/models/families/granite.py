"""Granite: Llama with a scale on the embedding, on scores, on what each block adds, and on the logits."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, Lineage
from penstock.policy import policy

SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
}
NO_SCALES = {**dict.fromkeys(SCALES.values(), 1.0), "logits_scaling": 1.0}


@policy("model.family", "granite")
class Granite(Lineage):
    """Granite 3 and 4, dense."""

    architecture = "GraniteForCausalLM"
    fields = FIELDS | SCALES | {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
        **NO_SCALES,
    }
    example: ClassVar[dict[str, Any]] = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "mlp_bias": True,
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return {"logits_scale": 1 / hub["logits_scaling"]}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return {"logits_scaling": 1 / config.logits_scale, "attention_multiplier": config.scale}
