"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, TENSORS, Lineage, expert_tensors, mixture
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import policy


@policy("model.family", "mixtral")
class Mixtral(Lineage):
    """Mixtral 8x7B and 8x22B.

    ``router_aux_loss_coef`` becomes ``balance_weight`` as it stands, though the losses that they weigh differ in scale:
    ours is 1 a layer at perfect balance and is summed over layers, transformers' is k for all layers together.
    """

    tensors = TENSORS | expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2")
    architecture = "MixtralForCausalLM"
    rank = 4
    fields = FIELDS | {"window": "sliding_window"}
    defaults: ClassVar[dict[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "router_aux_loss_coef": 0.001,
    }
    example: ClassVar[dict[str, Any]] = {"sliding_window": 5}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        experts = {
            "experts": hub["num_local_experts"],
            "ffn": hub["intermediate_size"],
            "router": SoftmaxRouter(top_k=hub["num_experts_per_tok"]),
            "balance_weight": hub["router_aux_loss_coef"],
        }
        return {"moe": experts}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        return {
            "intermediate_size": moe.ffn,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": router.top_k,
            "router_aux_loss_coef": moe.balance_weight,
        }
