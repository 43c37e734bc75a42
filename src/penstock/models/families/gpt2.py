"""GPT-2: learned positions, layer norms, biases, and matrices that stand on disk with inputs as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import LAYER, Lineage
from penstock.policy import policy

BLOCK = "transformer.h.{layer}"

#: Ours and theirs of a layer.
MODULES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.gate_up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


@policy("model.family", "gpt2")
class GPT2(Lineage):
    """GPT-2, from 124M to 1.5B, and what has its layout."""

    tensors: ClassVar[dict[str, tuple[str, ...]]] = {
        "embedding.weight": ("transformer.wte.weight",),
        "position_embedding.weight": ("transformer.wpe.weight",),
        **{
            f"{LAYER}.{ours}.{part}": (f"{BLOCK}.{theirs}.{part}",)
            for ours, theirs in MODULES.items()
            for part in ("weight", "bias")
        },
        "norm.weight": ("transformer.ln_f.weight",),
        "norm.bias": ("transformer.ln_f.bias",),
        "head.weight": ("lm_head.weight",),
    }
    transposed = frozenset(f"{LAYER}.{ours}.weight" for ours in MODULES if "norm" not in ours)
    architecture = "GPT2LMHeadModel"
    fields: ClassVar[Mapping[str, str]] = {
        "vocabulary": "vocab_size",
        "hidden": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "context": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
        "init_std": "initializer_range",
    }
    fixed: ClassVar[dict[str, Any]] = {
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "learned_positions": True,
    }
    activation = "activation_function"
    defaults: ClassVar[dict[str, Any]] = {
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "n_inner": None,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    example: ClassVar[dict[str, Any]] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40}

    def weight(self, name: str, config: DecoderConfig) -> str | None:
        # The published folders have masks, and the names of the model without its head.
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if hub[key]:
                raise ModelError(f"{key} is not supported")
        if hub["n_embd"] % hub["n_head"]:
            raise ModelError(f"n_embd ({hub['n_embd']}) is no multiple of n_head ({hub['n_head']})")
        return {
            "kv_heads": hub["n_head"],
            "head_dim": hub["n_embd"] // hub["n_head"],
            "ffn": hub["n_inner"] or 4 * hub["n_embd"],
            "unrotated_layers": range(hub["n_layer"]),
            "attention_scale": None if hub["scale_attn_weights"] else 1.0,
        }

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        plain = config.scale == config.head_dim**-0.5
        return {"n_inner": config.ffn, "scale_attn_weights": plain}

    def rope_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return {}

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return {}
