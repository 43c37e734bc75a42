"""ModernBERT (Warner et al. 2024): angles for positions, gated blocks, and windows in two layers of three."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.encoders.classifier import HeadConfig
from penstock.models.encoders.config import EncoderConfig
from penstock.models.encoders.contract import LAYER, EncoderFamily, activation_of
from penstock.models.families.contract import HubConfig
from penstock.policy import policy

BLOCK = "layers.{layer}"

#: Ours and theirs of a layer.
MODULES = {
    "qkv": "attn.Wqkv",
    "output": "attn.Wo",
    "attention_norm": "attn_norm",
    "gate_up": "mlp.Wi",
    "down": "mlp.Wo",
    "mlp_norm": "mlp_norm",
}


@policy("model.encoder", "modernbert")
class ModernBert(EncoderFamily):
    """Norms before the blocks, no biases, and two bases of angles."""

    tensors: ClassVar[dict[str, tuple[str, ...]]] = {
        "embedding.weight": ("embeddings.tok_embeddings.weight",),
        **{f"embedding_norm.{part}": (f"embeddings.norm.{part}",) for part in ("weight", "bias")},
        **{
            f"{LAYER}.{ours}.{part}": (f"{BLOCK}.{theirs}.{part}",)
            for ours, theirs in MODULES.items()
            for part in ("weight", "bias")
        },
        **{f"norm.{part}": (f"final_norm.{part}",) for part in ("weight", "bias")},
    }
    prefix = "model."
    unused: ClassVar[tuple[str, ...]] = ("head.", "decoder.", "classifier.")
    head_tensors: ClassVar[dict[str, str]] = {"dense": "head.dense", "norm": "head.norm", "out": "classifier"}
    example: ClassVar[dict[str, Any]] = {
        "local_attention": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "norm_eps": 1e-3,
        "classifier_pooling": "mean",
        "classifier_activation": "silu",
        "classifier_bias": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    }

    def config_from_hub(self, hub: HubConfig) -> EncoderConfig:
        layers = hub["num_hidden_layers"]
        kinds = hub.get("layer_types")
        if kinds is None:
            every = hub.get("global_attn_every_n_layers", 3)
            kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]
        return EncoderConfig(
            vocabulary=hub["vocab_size"],
            hidden=hub["hidden_size"],
            layers=layers,
            heads=hub["num_attention_heads"],
            ffn=hub["intermediate_size"],
            context=hub["max_position_embeddings"],
            norm_eps=hub.get("norm_eps", 1e-5),
            norm_bias=hub.get("norm_bias", False),
            pre_norm=True,
            attention_bias=hub.get("attention_bias", False),
            mlp_bias=hub.get("mlp_bias", False),
            activation=activation_of(hub.get("hidden_activation", "gelu")),
            gated=True,
            thetas=(_theta(hub, "full", "global", 160_000.0), _theta(hub, "sliding", "local", 10_000.0)),
            window=hub.get("local_attention", 128) // 2,
            windowed=tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"),
        )

    def head_from_hub(self, hub: HubConfig) -> HeadConfig:
        return HeadConfig(
            way=hub.get("classifier_pooling", "cls"),
            bias=hub.get("classifier_bias", False),
            activation=activation_of(hub.get("classifier_activation", "gelu")),
            norm=True,
            norm_bias=hub.get("norm_bias", False),
            norm_eps=hub.get("norm_eps", 1e-5),
        )


def _theta(hub: HubConfig, kind: str, formerly: str, usual: float) -> float:
    """The base of the angles of layers of a kind; before transformers 5, it had a key of its own."""
    told = dict((hub.get("rope_parameters") or {}).get(f"{kind}_attention") or {})
    scaling = told.get("rope_type", "default")
    if scaling != "default" or hub.get("rope_scaling"):
        raise ModelError(f"the RoPE scaling {scaling!r} is not supported in encoders")
    theta: float = told.get("rope_theta", hub.get(f"{formerly}_rope_theta", usual))
    return theta
