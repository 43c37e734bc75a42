"""Granite-MoE: Granite with experts in every layer, each layer's in two tensors."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.granite import NO_SCALES, SCALES, Granite
from penstock.models.families.lineage import FIELDS, HUB_LAYER, LAYER, TENSORS, mixture
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import policy


@policy("model.family", "granitemoe")
class GraniteMoE(Granite):
    """Granite 3 1B-A400M and 3B-A800M.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = TENSORS | {
        f"{LAYER}.mlp.router.weight": (f"{HUB_LAYER}.block_sparse_moe.router.layer.weight",),
        f"{LAYER}.mlp.gate_up": (f"{HUB_LAYER}.block_sparse_moe.input_linear.weight",),
        f"{LAYER}.mlp.down": (f"{HUB_LAYER}.block_sparse_moe.output_linear.weight",),
    }
    architecture = "GraniteMoeForCausalLM"
    fields = FIELDS | SCALES | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "attention_bias": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        **NO_SCALES,
    }
    example: ClassVar[dict[str, Any]] = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        experts = {
            "experts": hub["num_local_experts"],
            "ffn": hub["intermediate_size"],
            "router": SoftmaxRouter(top_k=hub["num_experts_per_tok"]),
            "balance_weight": hub["router_aux_loss_coef"],
        }
        return {**super().features_from_hub(hub), "moe": experts}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        return {
            **super().features_to_hub(config),
            "intermediate_size": moe.ffn,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": router.top_k,
            "router_aux_loss_coef": moe.balance_weight,
        }
