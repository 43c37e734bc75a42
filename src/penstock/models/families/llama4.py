"""Llama 4: attention in chunks, one expert a token whose input is weighted, no rotation in every fourth layer."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, HUB_LAYER, LAYER, TENSORS, Lineage, mixture, shared_tensors
from penstock.models.families.smollm3 import unrotated_from_hub, unrotated_to_hub
from penstock.models.families.windows import FULL, kinds_to_hub, windows_from_hub
from penstock.models.routers.sigmoid import SigmoidRouter
from penstock.policy import policy

CHUNKED = "chunked_attention"
_BLOCK = f"{HUB_LAYER}.feed_forward"


@policy("model.family", "llama4_text")
class Llama4(Lineage):
    """The part for text of Llama 4: Scout and Maverick.

    For ``router_aux_loss_coef`` see :class:`~penstock.models.families.mixtral.Mixtral`.
    """

    tensors = (
        TENSORS
        | shared_tensors("feed_forward.shared_expert")
        | {
            f"{LAYER}.mlp.gate_up.weight": (f"{_BLOCK}.gate_proj.weight", f"{_BLOCK}.up_proj.weight"),
            f"{LAYER}.mlp.down.weight": (f"{_BLOCK}.down_proj.weight",),
            f"{LAYER}.mlp.router.weight": (f"{_BLOCK}.router.weight",),
            f"{LAYER}.mlp.gate_up": (f"{_BLOCK}.experts.gate_up_proj",),
            f"{LAYER}.mlp.down": (f"{_BLOCK}.experts.down_proj",),
        }
    )
    transposed = frozenset({f"{LAYER}.mlp.gate_up", f"{LAYER}.mlp.down"})
    architecture = "Llama4ForCausalLM"
    fields = FIELDS | {
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "ffn": "intermediate_size_mlp",
        "window": "attention_chunk_size",
    }
    rotation: ClassVar[dict[str, Any]] = {"interleaved": True}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "router_aux_loss_coef": 0.001,
    }
    example: ClassVar[dict[str, Any]] = {
        "intermediate_size_mlp": 20,
        "attention_chunk_size": 5,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
        "attn_scale": 0.5,
        "moe_layers": [0, 2],
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        count, unrotated = hub["num_hidden_layers"], unrotated_from_hub(hub)
        size, step, sparse = hub["attention_chunk_size"], hub["interleave_moe_layer_step"], hub["moe_layers"]
        if sparse is None:
            sparse = range(step - 1, count, step)
        usual = [FULL if layer in unrotated or size is None else CHUNKED for layer in range(count)]
        heat = {"scale": hub["attn_scale"], "span": hub["floor_scale"], "shift": 1}
        experts = {
            "experts": hub["num_local_experts"],
            "ffn": hub["intermediate_size"],
            "router": SigmoidRouter(top_k=hub["num_experts_per_tok"], normalize=False, bias=False),
            "balance_weight": hub["router_aux_loss_coef"],
            "shared_ffn": hub["intermediate_size"],
            "dense_layers": [layer for layer in range(count) if layer not in sparse],
            "weigh_inputs": True,
        }
        return {
            "chunked": True,
            "qk_norm": "turned" if hub["use_qk_norm"] else None,
            "unrotated_layers": unrotated,
            "temperature": heat if hub["attn_temperature_tuning"] and unrotated else None,
            **windows_from_hub(HubConfig({**hub, "sliding_window": size}), usual, CHUNKED),
            "moe": experts,
        }

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        moe, router = mixture(config, SigmoidRouter)
        heat = config.temperature
        tuned = {"attn_scale": heat.scale, "floor_scale": heat.span} if heat else {}
        return {
            **unrotated_to_hub(config),
            "layer_types": kinds_to_hub(config, CHUNKED),
            "use_qk_norm": config.qk_norm is not None,
            "attn_temperature_tuning": heat is not None,
            **tuned,
            "num_local_experts": moe.experts,
            "intermediate_size": moe.ffn,
            "num_experts_per_tok": router.top_k,
            "router_aux_loss_coef": moe.balance_weight,
            "moe_layers": [layer for layer in range(config.layers) if config.sparse(layer)],
        }
