"""Phi-3: one matrix for queries, keys and values, and LongRoPE."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, HUB_LAYER, LAYER, TENSORS, Lineage
from penstock.models.families.rope import rope_to_hub
from penstock.policy import policy

#: Where gate and up are one tensor.
FUSED = {f"{LAYER}.mlp.gate_up.weight": (f"{HUB_LAYER}.mlp.gate_up_proj.weight",)}


@policy("model.family", "phi3")
class Phi3(Lineage):
    """Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

    tensors = TENSORS | FUSED | {f"{LAYER}.attention.qkv.weight": (f"{HUB_LAYER}.self_attn.qkv_proj.weight",)}
    architecture = "Phi3ForCausalLM"
    fields = FIELDS | {"window": "sliding_window"}
    partial = True
    defaults: ClassVar[dict[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    }
    example: ClassVar[dict[str, Any]] = {
        "head_dim": 8,
        "sliding_window": 9,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    }

    def rope_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        found = super().rope_from_hub(hub)
        kind = found["rope"].get("scaling", {}).get("kind", "longrope")
        if kind != "longrope":
            raise ModelError(f"the RoPE scaling {kind!r} is not supported in this family", hint="Supported: longrope.")
        return found

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        keys = rope_to_hub(config.rope)
        # transformers takes it from here alone.
        original = (keys["rope_scaling"] or {}).get("original_max_position_embeddings")
        return keys | {"original_max_position_embeddings": original or config.context}
