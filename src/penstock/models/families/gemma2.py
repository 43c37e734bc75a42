"""Gemma 2: Gemma with norms on both sides of each block, soft-capped scores and logits, and windows in every other
layer."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.gemma import BIAS
from penstock.models.families.lineage import FIELDS, TENSORS, Lineage, norm_tensors, whole_heads
from penstock.models.families.windows import all_but_every, windows_from_hub, windows_to_hub
from penstock.policy import policy


@policy("model.family", "gemma2")
class Gemma2(Lineage):
    """Gemma 2: 2B, 9B and 27B."""

    tensors = TENSORS | norm_tensors(
        attended_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        fed_norm="post_feedforward_layernorm",
    )
    architecture = "Gemma2ForCausalLM"
    fields = FIELDS | BIAS | {"attention_cap": "attn_logit_softcapping", "logits_cap": "final_logit_softcapping"}
    fixed: ClassVar[dict[str, Any]] = {"norm": "rms_offset", "norm_place": "both"}
    activation = "hidden_activation"
    defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 256,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
    }
    example: ClassVar[dict[str, Any]] = {
        "sliding_window": 5,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 9.0,
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        whole_heads(hub)
        if hub["use_bidirectional_attention"]:
            raise ModelError("use_bidirectional_attention is not supported: the Decoder is causal")
        return {
            "embedding_scale": hub["hidden_size"] ** 0.5,
            "attention_scale": hub["query_pre_attn_scalar"] ** -0.5,
            **windows_from_hub(hub, all_but_every(hub["sliding_window_pattern"], hub["num_hidden_layers"])),
        }

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return {"query_pre_attn_scalar": round(config.scale**-2), **windows_to_hub(config)}
