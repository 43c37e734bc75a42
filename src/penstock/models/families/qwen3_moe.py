"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, TENSORS, Lineage, expert_tensors, mixture
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import policy


@policy("model.family", "qwen3_moe")
class Qwen3MoE(Lineage):
    """Qwen3 30B-A3B, 235B-A22B and their like; a sliding window, where there is one, is in every layer.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = TENSORS | expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    architecture = "Qwen3MoeForCausalLM"
    rank = 1
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
    fixed: ClassVar[dict[str, Any]] = {"qk_norm": "head"}
    defaults: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    }
    example: ClassVar[dict[str, Any]] = {"use_sliding_window": True, "sliding_window": 5, "mlp_only_layers": [1]}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        # transformers 4 and every published folder say num_experts, transformers 5 writes num_local_experts.
        experts = hub["num_local_experts"] if "num_local_experts" in hub else hub["num_experts"]
        step, dense = hub["decoder_sparse_step"], hub["mlp_only_layers"] or []
        moe = {
            "experts": experts,
            "ffn": hub["moe_intermediate_size"],
            "router": SoftmaxRouter(top_k=hub["num_experts_per_tok"], normalize=hub["norm_topk_prob"]),
            "balance_weight": hub["router_aux_loss_coef"],
            "dense_layers": [i for i in range(hub["num_hidden_layers"]) if i in dense or (i + 1) % step],
        }
        return {
            "window": hub["sliding_window"] if hub["use_sliding_window"] else None,
            "moe": moe if experts else None,
        }

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        return {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "num_experts": moe.experts,
            "moe_intermediate_size": moe.ffn,
            "num_experts_per_tok": router.top_k,
            "norm_topk_prob": router.normalize,
            "router_aux_loss_coef": moe.balance_weight,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(config.layers) if not config.sparse(layer)],
        }
