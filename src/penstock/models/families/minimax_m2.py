"""MiniMax-M2: experts scored one by one, half of each head turned, norms over all heads together."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import HUB_LAYER, LAYER, TENSORS, Lineage, expert_tensors, mixture
from penstock.models.routers.sigmoid import SigmoidRouter
from penstock.policy import policy


@policy("model.family", "minimax_m2")
class MiniMaxM2(Lineage):
    """MiniMax-M2 and its successors.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = (
        TENSORS
        | expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2")
        | {f"{LAYER}.mlp.selection_bias": (f"{HUB_LAYER}.block_sparse_moe.e_score_correction_bias",)}
    )
    architecture = "MiniMaxM2ForCausalLM"
    fixed: ClassVar[dict[str, Any]] = {"qk_norm": "width"}
    partial = True
    defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 128,
        "rope_theta": 5_000_000.0,
        "rotary_dim": None,
        "router_aux_loss_coef": 0.001,
    }
    example: ClassVar[dict[str, Any]] = {"rotary_dim": 6}

    def rope_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        if hub["rotary_dim"] is not None and hub.get("partial_rotary_factor") is None:
            hub = HubConfig({**hub, "partial_rotary_factor": hub["rotary_dim"] / hub["head_dim"]})
        return super().rope_from_hub(hub)

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        experts = {
            "experts": hub["num_local_experts"],
            "ffn": hub["intermediate_size"],
            "router": SigmoidRouter(top_k=hub["num_experts_per_tok"]),
            "balance_weight": hub["router_aux_loss_coef"],
        }
        return {"moe": experts}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SigmoidRouter)
        return {
            "intermediate_size": moe.ffn,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": router.top_k,
            "router_aux_loss_coef": moe.balance_weight,
        }
