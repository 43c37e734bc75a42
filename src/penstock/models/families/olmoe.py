"""OLMoE: experts in every layer, and norms over all heads of queries and keys together."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, TENSORS, Lineage, expert_tensors, mixture, whole_heads
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import policy


@policy("model.family", "olmoe")
class Olmoe(Lineage):
    """OLMoE 1B-7B.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = TENSORS | expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    architecture = "OlmoeForCausalLM"
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
    fixed: ClassVar[dict[str, Any]] = {"qk_norm": "width"}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "router_aux_loss_coef": 0.01,
    }
    example: ClassVar[dict[str, Any]] = {"head_dim": 8}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        whole_heads(hub)
        if hub["head_dim"] * hub["num_attention_heads"] != hub["hidden_size"]:
            raise ModelError(f"heads of {hub['head_dim']} do not make up hidden_size ({hub['hidden_size']})")
        if hub["clip_qkv"] is not None:
            raise ModelError("clip_qkv is not supported")
        experts = {
            "experts": hub["num_experts"],
            "ffn": hub["intermediate_size"],
            "router": SoftmaxRouter(top_k=hub["num_experts_per_tok"], normalize=hub["norm_topk_prob"]),
            "balance_weight": hub["router_aux_loss_coef"],
        }
        return {"moe": experts}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        return {
            "intermediate_size": moe.ffn,
            "num_experts": moe.experts,
            "num_experts_per_tok": router.top_k,
            "norm_topk_prob": router.normalize,
            "router_aux_loss_coef": moe.balance_weight,
        }
