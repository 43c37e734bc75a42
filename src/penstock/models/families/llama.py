"""Llama: the plain dense decoder, with optional biases."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, Lineage, whole_heads
from penstock.policy import policy


@policy("model.family", "llama")
class Llama(Lineage):
    """Llama 1 to 3, and the many models that keep its layout. transformers wants heads that divide the width."""

    architecture = "LlamaForCausalLM"
    rank = 6
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"}
    defaults: ClassVar[dict[str, Any]] = {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False}
    example: ClassVar[dict[str, Any]] = {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        whole_heads(hub)
        return {}
