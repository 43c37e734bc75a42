"""OLMo 2: norms behind the blocks instead of before them, and over all heads of queries and keys together."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS, TENSORS, Lineage, norm_tensors
from penstock.policy import policy


@policy("model.family", "olmo2")
class Olmo2(Lineage):
    """OLMo 2: 1B to 32B."""

    tensors = TENSORS | norm_tensors(attended_norm="post_attention_layernorm", fed_norm="post_feedforward_layernorm")
    architecture = "Olmo2ForCausalLM"
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
    fixed: ClassVar[dict[str, Any]] = {"norm_place": "after", "qk_norm": "width"}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
    }
