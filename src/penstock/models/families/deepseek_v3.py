"""DeepSeek-V3: latent attention, and experts scored one by one in groups, with a bias that balances them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.glm4_moe import (
    EXPERTS,
    grouped_experts_from_hub,
    grouped_experts_to_hub,
    sigmoid_from_hub,
    sigmoid_to_hub,
)
from penstock.models.families.lineage import FIELDS, HUB_LAYER, LAYER, TENSORS, Lineage, mixture, own_layer
from penstock.models.rotary import yarn_magnitude
from penstock.models.routers.sigmoid import SigmoidRouter
from penstock.policy import policy

#: Ours and theirs of a layer's attention.
MODULES = {
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "down": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm",
    "up": "kv_b_proj",
}
LATENT_TENSORS = {
    f"{LAYER}.attention.{ours}.{part}": (f"{HUB_LAYER}.self_attn.{theirs}.{part}",)
    for ours, theirs in MODULES.items()
    for part in ("weight", "bias")
}
#: Where queries come straight from the hidden states, and where they come through a latent of their own.
QUERY = {
    f"{LAYER}.attention.query.weight": (f"{HUB_LAYER}.self_attn.q_proj.weight",),
    f"{LAYER}.attention.query_up.weight": (f"{HUB_LAYER}.self_attn.q_b_proj.weight",),
}


class LatentLineage(Lineage):
    """What DeepSeek-V2 and V3 share: their attention."""

    fields: ClassVar[Mapping[str, str]] = {
        ours: theirs for ours, theirs in FIELDS.items() if ours not in ("kv_heads", "head_dim")
    } | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}

    def latent_from_hub(self, hub: HubConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """The fields of the attention, for the fields ``rope``."""
        plain, rotated = hub["qk_nope_head_dim"], hub["qk_rope_head_dim"]
        scaling = rope.get("scaling", {})
        everywhere = scaling.get("mscale_all_dim")
        stretch = yarn_magnitude(scaling["factor"], everywhere) if everywhere else 1.0
        return {
            "kv_heads": hub["num_attention_heads"],
            "head_dim": plain + rotated,
            "attention_scale": (plain + rotated) ** -0.5 * stretch * stretch,
            "latent": {
                "rank": hub["kv_lora_rank"],
                "rotated": rotated,
                "plain": plain,
                "value": hub["v_head_dim"],
                "query_rank": hub["q_lora_rank"],
            },
        }

    def latent_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        """Its keys.

        Raises:
            ModelError: the attention is of another kind.
        """
        if config.latent is None:
            raise ModelError("attention is not latent")
        return {
            "num_key_value_heads": config.heads,
            "kv_lora_rank": config.latent.rank,
            "q_lora_rank": config.latent.query_rank,
            "qk_nope_head_dim": config.latent.plain,
            "qk_rope_head_dim": config.latent.rotated,
            "v_head_dim": config.latent.value,
        }


@policy("model.family", "deepseek_v3")
class DeepseekV3(LatentLineage):
    """DeepSeek-V3, V3.1 and R1, Kimi-K2, Moonlight; layers that predict more than one token are left out."""

    tensors = TENSORS | EXPERTS | LATENT_TENSORS | QUERY
    architecture = "DeepseekV3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "rope_interleave": True,
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
    }
    example: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 10,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "num_local_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    }

    def weight(self, name: str, config: DecoderConfig) -> str | None:
        return super().weight(name, config) if own_layer(name, config) else None

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        rope = {**self.rope_from_hub(hub)["rope"], "interleaved": hub["rope_interleave"]}
        moe = grouped_experts_from_hub(hub, sigmoid_from_hub(hub))
        return {"rope": rope, **self.latent_from_hub(hub, rope), "moe": moe}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SigmoidRouter)
        return {
            "rope_interleave": config.rope.interleaved,
            **self.latent_to_hub(config),
            **grouped_experts_to_hub(config, moe),
            **sigmoid_to_hub(router),
        }
