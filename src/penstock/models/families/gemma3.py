"""Gemma 3: Gemma 2 with norms on queries and keys in place of soft-capping, and a short rotation under windows."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.gemma import BIAS
from penstock.models.families.gemma2 import Gemma2
from penstock.models.families.lineage import FIELDS
from penstock.models.families.rope import rope_to_hub, ropes_from_hub
from penstock.policy import policy

#: The base of the rotation under windows.
LOCAL = "rope_local_base_freq"


@policy("model.family", "gemma3_text")
class Gemma3(Gemma2):
    """The text models of Gemma 3, from 270M on; of those that see pictures, the part for text."""

    architecture = "Gemma3ForCausalLM"
    fields = FIELDS | BIAS | {"logits_cap": "final_logit_softcapping"}
    fixed: ClassVar[dict[str, Any]] = {**Gemma2.fixed, "qk_norm": "head"}
    defaults: ClassVar[dict[str, Any]] = {
        **Gemma2.defaults,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        LOCAL: 10_000.0,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    example: ClassVar[dict[str, Any]] = {
        "sliding_window": 5,
        "query_pre_attn_scalar": 7,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 9.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }

    def rope_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return ropes_from_hub(hub, LOCAL)

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return {**rope_to_hub(config.rope), LOCAL: (config.local_rope or config.rope).theta}
