"""The architectures of GGUF, and what llama.cpp's converters and its models do otherwise than Hugging Face folders.

What a file does not say stands in llama.cpp's source, by architecture and size; so it does here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from penstock.core.errors import ModelError

#: Looks up a value of the metadata, below the name of the architecture.
Look = Callable[[str], Any]


class Architecture(NamedTuple):
    """How an architecture of GGUF stands in Hugging Face folders.

    Attributes:
        model_type: of the family that it is.
        turned: whether rows of queries and keys stand in the order of pairs that rotate together.
        keys: the keys of config.json that this architecture has beyond the common ones, by ours in the metadata.
        raised: whether one was added to the scales of norms.
        more: what else config.json says, of the metadata and of the keys that are found.
    """

    model_type: str
    turned: bool = False
    keys: Mapping[str, str] = {}
    raised: bool = False
    more: Callable[[Look, Mapping[str, Any]], dict[str, Any]] = lambda own, config: {}


def _gemma(largest: int) -> Callable[[Look, Mapping[str, Any]], dict[str, Any]]:
    """By what scores of queries are divided, squared: the size of a head, but in the model with ``largest`` layers a
    head's part of the hidden size."""

    def more(own: Look, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["num_hidden_layers"] == largest:
            return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
        return {"query_pre_attn_scalar": own("attention.key_length")}

    return more


def _partly_turned(own: Look, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a head that is turned."""
    size = own("attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    turned = own("rope.dimension_count")
    return {} if turned in (None, size) else {"partial_rotary_factor": turned / size}


def _no_windows(own: Look, config: Mapping[str, Any]) -> dict[str, Any]:
    """Files of OLMo 3 have the architecture of OLMo 2, and windows."""
    if config.get("sliding_window"):
        raise ModelError("it holds an OLMo 3, which is not supported as a GGUF file", hint="Use its folder.")
    return {}


_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_LAYER_NORM = "attention.layer_norm_epsilon"
_EXPERTS = {"num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}

ARCHITECTURES = {
    "llama": Architecture("llama", turned=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", keys={**_EXPERTS, "num_experts": "expert_count"}),
    "gemma": Architecture("gemma", raised=True),
    "gemma2": Architecture("gemma2", raised=True, keys=_CAPS, more=_gemma(46)),
    "gemma3": Architecture("gemma3_text", raised=True, keys=_CAPS, more=_gemma(62)),
    "phi3": Architecture(
        "phi3",
        keys={"original_max_position_embeddings": "rope.scaling.original_context_length"},
        more=_partly_turned,
    ),
    "olmo2": Architecture("olmo2", more=_no_windows),
    "glm4": Architecture("glm4", more=_partly_turned),
    "granite": Architecture(
        "granite",
        turned=True,
        keys={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention.scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "smollm3": Architecture("smollm3", turned=True),
    "starcoder2": Architecture("starcoder2", keys={"norm_epsilon": _LAYER_NORM}),
    "cohere2": Architecture("cohere2", keys={"layer_norm_eps": _LAYER_NORM, "logit_scale": "logit_scale"}),
}

#: The same with a mixture of experts, where it is another family.
SPARSE = {
    "llama": Architecture(
        "mixtral", turned=True, keys={"num_experts_per_tok": "expert_used_count", "num_local_experts": "expert_count"}
    )
}

#: Keys of config.json and of the metadata, below the name of the architecture.
COMMON = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
}
