"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped gate."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, HUB_LAYER, LAYER, TENSORS, Lineage, mixture
from penstock.models.families.windows import all_but_every, windows_from_hub, windows_to_hub
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.ops.activations import STEEPNESS
from penstock.policy import policy

_EXPERTS = f"{HUB_LAYER}.mlp.experts"


@policy("model.family", "gpt_oss")
class GptOss(Lineage):
    """gpt-oss 20B and 120B, in bf16 or, as they are published, with experts in MXFP4.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = TENSORS | {
        f"{LAYER}.attention.sinks": (f"{HUB_LAYER}.self_attn.sinks",),
        f"{LAYER}.mlp.router.weight": (f"{HUB_LAYER}.mlp.router.weight",),
        f"{LAYER}.mlp.router.bias": (f"{HUB_LAYER}.mlp.router.bias",),
        f"{LAYER}.mlp.gate_up": (f"{_EXPERTS}.gate_up_proj",),
        f"{LAYER}.mlp.gate_up_bias": (f"{_EXPERTS}.gate_up_proj_bias",),
        f"{LAYER}.mlp.down": (f"{_EXPERTS}.down_proj",),
        f"{LAYER}.mlp.down_bias": (f"{_EXPERTS}.down_proj_bias",),
    }
    transposed = frozenset({f"{LAYER}.mlp.gate_up", f"{LAYER}.mlp.down"})
    architecture = "GptOssForCausalLM"
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
    fixed: ClassVar[dict[str, Any]] = {"sinks": True}
    defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "swiglu_alpha": STEEPNESS,
        "swiglu_limit": 7.0,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "router_aux_loss_coef": 0.001,
    }
    example: ClassVar[dict[str, Any]] = {
        "sliding_window": 5,
        "swiglu_limit": 0.9,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        if hub["swiglu_alpha"] != STEEPNESS:
            raise ModelError(f"swiglu_alpha ({hub['swiglu_alpha']}) is not supported: it is {STEEPNESS}")
        experts = {
            "experts": hub["num_local_experts"],
            "ffn": hub["intermediate_size"],
            "router": SoftmaxRouter(top_k=hub["num_experts_per_tok"]),
            "balance_weight": hub["router_aux_loss_coef"],
            "router_bias": True,
            "expert_bias": True,
            "clamp": hub["swiglu_limit"],
        }
        return {**windows_from_hub(hub, all_but_every(2, hub["num_hidden_layers"])), "moe": experts}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SoftmaxRouter)
        return {
            **windows_to_hub(config),
            "intermediate_size": moe.ffn,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": router.top_k,
            "router_aux_loss_coef": moe.balance_weight,
            "swiglu_limit": moe.clamp,
        }

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        keys = super().rope_to_hub(config)
        # Absent, it would be taken for the published models' own.
        return keys | {"rope_scaling": keys["rope_scaling"] or {"rope_type": "default"}}
