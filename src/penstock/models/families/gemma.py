"""Gemma: a scaled embedding, norms whose scale is stored less one, and a gate with gelu."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, Lineage
from penstock.policy import policy

#: Every token's embedding is multiplied by the root of its size.
BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}


@policy("model.family", "gemma")
class Gemma(Lineage):
    """The first Gemma, 2B and 7B, and CodeGemma."""

    architecture = "GemmaForCausalLM"
    fields = FIELDS | BIAS
    fixed: ClassVar[dict[str, Any]] = {"norm": "rms_offset"}
    defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 256,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return {"embedding_scale": hub["hidden_size"] ** 0.5}
