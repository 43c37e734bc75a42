"""GLM-4.5: experts scored one by one, in groups, with a bias that balances them, and half of each head turned."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import (
    FIELDS,
    HUB_LAYER,
    LAYER,
    TENSORS,
    Lineage,
    expert_tensors,
    mixture,
    own_layer,
    shared_tensors,
)
from penstock.models.routers.contract import Router
from penstock.models.routers.sigmoid import SigmoidRouter
from penstock.policy import policy

#: Of experts that are scored with a bias, beside one that sees every token.
EXPERTS = (
    expert_tensors("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    | shared_tensors("mlp.shared_experts")
    | {f"{LAYER}.mlp.selection_bias": (f"{HUB_LAYER}.mlp.gate.e_score_correction_bias",)}
)


def grouped_experts_from_hub(hub: HubConfig, router: Router) -> dict[str, Any]:
    """The fields of the experts of DeepSeek's descendants, all but the first layers' being sparse."""
    return {
        "experts": hub["n_routed_experts"],
        "ffn": hub["moe_intermediate_size"],
        "router": router,
        "balance_weight": 0.0,
        "shared_ffn": hub["moe_intermediate_size"] * (hub["n_shared_experts"] or 0),
        "dense_layers": range(hub["first_k_dense_replace"]),
    }


def grouped_experts_to_hub(config: DecoderConfig, moe: MoEConfig) -> dict[str, Any]:
    """Their keys.

    Raises:
        ModelError: the shared expert is not as wide as several others.
    """
    shared, rest = divmod(moe.shared_ffn, moe.ffn)
    if rest:
        raise ModelError("moe.shared_ffn")
    return {
        "n_routed_experts": moe.experts,
        "moe_intermediate_size": moe.ffn,
        "n_shared_experts": shared,
        "num_experts_per_tok": moe.router.top_k,
        "first_k_dense_replace": sum(not config.sparse(layer) for layer in range(config.layers)),
    }


def sigmoid_from_hub(hub: HubConfig) -> SigmoidRouter:
    """DeepSeek-V3's router."""
    return SigmoidRouter(
        top_k=hub["num_experts_per_tok"],
        scale=hub["routed_scaling_factor"],
        normalize=hub["norm_topk_prob"],
        groups=hub["n_group"],
        kept_groups=hub["topk_group"],
    )


def sigmoid_to_hub(router: SigmoidRouter) -> dict[str, Any]:
    """Its keys."""
    return {
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.normalize,
        "n_group": router.groups,
        "topk_group": router.kept_groups,
    }


@policy("model.family", "glm4_moe")
class Glm4MoE(Lineage):
    """GLM-4.5, GLM-4.5-Air, GLM-4.6 and 4.7; layers that predict more than one token are left out."""

    tensors = TENSORS | EXPERTS
    architecture = "Glm4MoeForCausalLM"
    fields = FIELDS | {"qkv_bias": "attention_bias"}
    partial = True
    defaults: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": False,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }
    example: ClassVar[dict[str, Any]] = {
        "num_local_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    }

    def weight(self, name: str, config: DecoderConfig) -> str | None:
        return super().weight(name, config) if own_layer(name, config) else None

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        moe = grouped_experts_from_hub(hub, sigmoid_from_hub(hub))
        return {"qk_norm": "head" if hub["use_qk_norm"] else None, "moe": moe}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SigmoidRouter)
        return {
            "use_qk_norm": config.qk_norm is not None,
            **grouped_experts_to_hub(config, moe),
            **sigmoid_to_hub(router),
        }
