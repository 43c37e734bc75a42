"""DeepSeek-V2: latent attention, and the most probable experts, of the best groups only."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.deepseek_v3 import LATENT_TENSORS, QUERY, LatentLineage
from penstock.models.families.glm4_moe import grouped_experts_from_hub, grouped_experts_to_hub
from penstock.models.families.lineage import TENSORS, expert_tensors, mixture, shared_tensors
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import policy

GREEDY, GROUPED = "greedy", "group_limited_greedy"


@policy("model.family", "deepseek_v2")
class DeepseekV2(LatentLineage):
    """DeepSeek-V2, V2-Lite and V2.5, and DeepSeek-Coder-V2."""

    tensors = (
        TENSORS
        | expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj")
        | shared_tensors("mlp.shared_experts")
        | LATENT_TENSORS
        | QUERY
    )
    architecture = "DeepseekV2ForCausalLM"
    rotation: ClassVar[dict[str, Any]] = {"interleaved": True}
    defaults: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "mlp_bias": False,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": GREEDY,
        "n_group": None,
        "topk_group": None,
    }
    example: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "n_routed_experts": 6,
        "num_experts": 6,
        "num_local_experts": 6,
        "topk_method": GROUPED,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        if hub["mlp_bias"]:
            raise ModelError("mlp_bias is not supported")
        method = hub["topk_method"]
        if method not in (GREEDY, GROUPED):
            raise ModelError(f"topk_method {method!r} is not supported", hint=f"Supported: {GREEDY}, {GROUPED}.")
        groups = {"groups": hub["n_group"], "kept_groups": hub["topk_group"]} if method == GROUPED else {}
        router = SoftmaxRouter(
            top_k=hub["num_experts_per_tok"], normalize=False, scale=hub["routed_scaling_factor"], **groups
        )
        moe = grouped_experts_from_hub(hub, router)
        return {**self.latent_from_hub(hub, self.rope_from_hub(hub)["rope"]), "moe": moe}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        return {
            **self.latent_to_hub(config),
            **grouped_experts_to_hub(config, moe),
            "routed_scaling_factor": router.scale,
            "topk_method": GROUPED if router.groups > 1 else GREEDY,
            "n_group": router.groups,
            "topk_group": router.kept_groups,
            "norm_topk_prob": False,
        }
