"""Qwen2-MoE: Qwen2 with experts, one of which sees every token behind a gate of its own."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import (
    FIELDS,
    HUB_LAYER,
    LAYER,
    TENSORS,
    Lineage,
    expert_tensors,
    mixture,
    shared_tensors,
)
from penstock.models.families.windows import FULL, SLIDING, kinds_to_hub, windows_from_hub
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import policy


@policy("model.family", "qwen2_moe")
class Qwen2MoE(Lineage):
    """Qwen1.5-MoE A2.7B and Qwen2 57B-A14B.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = (
        TENSORS
        | expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj")
        | shared_tensors("mlp.shared_expert")
        | {f"{LAYER}.mlp.shared_gate.weight": (f"{HUB_LAYER}.mlp.shared_expert_gate.weight",)}
    )
    architecture = "Qwen2MoeForCausalLM"
    fields = FIELDS | {"qkv_bias": "qkv_bias"}
    defaults: ClassVar[dict[str, Any]] = {
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632,
        "router_aux_loss_coef": 0.001,
    }
    example: ClassVar[dict[str, Any]] = {
        "use_sliding_window": True,
        "sliding_window": 5,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [1],
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        count, last = hub["num_hidden_layers"], hub["max_window_layers"]
        step, dense = hub["decoder_sparse_step"], hub["mlp_only_layers"] or []
        # transformers' own rule, which is not that of Qwen2.
        usual = [FULL if layer % 2 or layer >= last else SLIDING for layer in range(count)]
        moe = {
            "experts": hub["num_experts"],
            "ffn": hub["moe_intermediate_size"],
            "router": SoftmaxRouter(top_k=hub["num_experts_per_tok"], normalize=hub["norm_topk_prob"]),
            "balance_weight": hub["router_aux_loss_coef"],
            "shared_ffn": hub["shared_expert_intermediate_size"],
            "shared_gate": True,
            "dense_layers": [i for i in range(count) if i in dense or (i + 1) % step],
        }
        windows = windows_from_hub(hub, usual) if hub["use_sliding_window"] else {}
        return {**windows, "moe": moe}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        kinds = kinds_to_hub(config)
        return {
            "use_sliding_window": SLIDING in kinds,
            "sliding_window": config.window,
            "layer_types": kinds,
            "num_experts": moe.experts,
            "moe_intermediate_size": moe.ffn,
            "num_experts_per_tok": router.top_k,
            "norm_topk_prob": router.normalize,
            "router_aux_loss_coef": moe.balance_weight,
            "shared_expert_intermediate_size": moe.shared_ffn,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(config.layers) if not config.sparse(layer)],
        }
