"""BERT (Devlin et al. 2018), and the sentence encoders that were made of it: MiniLM, BGE, E5, GTE."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.encoders.config import EncoderConfig
from penstock.models.encoders.contract import LAYER, EncoderFamily, activation_of, refuse
from penstock.models.families.contract import HubConfig
from penstock.policy import policy

BLOCK = "encoder.layer.{layer}"

#: Ours and theirs of a layer.
MODULES = {
    "qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "gate_up": ("intermediate.dense",),
    "down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}


@policy("model.encoder", "bert")
class Bert(EncoderFamily):
    """Learned positions, and norms behind what each block adds to."""

    tensors: ClassVar[dict[str, tuple[str, ...]]] = {
        "embedding.weight": ("embeddings.word_embeddings.weight",),
        "position_embedding.weight": ("embeddings.position_embeddings.weight",),
        "kind_embedding.weight": ("embeddings.token_type_embeddings.weight",),
        **{f"embedding_norm.{part}": (f"embeddings.LayerNorm.{part}",) for part in ("weight", "bias")},
        **{
            f"{LAYER}.{ours}.{part}": tuple(f"{BLOCK}.{each}.{part}" for each in theirs)
            for ours, theirs in MODULES.items()
            for part in ("weight", "bias")
        },
    }
    prefix = "bert."
    unused: ClassVar[tuple[str, ...]] = ("pooler.", "cls.", "classifier.")
    head_tensors: ClassVar[dict[str, str]] = {"dense": "pooler.dense", "out": "classifier"}
    example: ClassVar[dict[str, Any]] = {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}

    def config_from_hub(self, hub: HubConfig) -> EncoderConfig:
        refuse(hub, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        places, first = hub["max_position_embeddings"], self.first_place(hub)
        return EncoderConfig(
            vocabulary=hub["vocab_size"],
            hidden=hub["hidden_size"],
            layers=hub["num_hidden_layers"],
            heads=hub["num_attention_heads"],
            ffn=hub["intermediate_size"],
            context=places - first,
            places=places,
            first_place=first,
            kinds=hub.get("type_vocab_size", 2),
            norm_eps=hub.get("layer_norm_eps", 1e-12),
            activation=activation_of(hub.get("hidden_act", "gelu")),
        )

    def first_place(self, hub: HubConfig) -> int:
        """The row of the table of positions that the first token of a text has."""
        return 0
