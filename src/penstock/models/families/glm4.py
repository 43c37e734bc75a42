"""GLM-4-0414: GLM-4 with norms on both sides of each block."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.glm import Glm
from penstock.models.families.lineage import norm_tensors
from penstock.policy import policy


@policy("model.family", "glm4")
class Glm4(Glm):
    """GLM-4-0414 and GLM-Z1: 9B and 32B."""

    tensors = Glm.tensors | norm_tensors(
        attended_norm="post_self_attn_layernorm", mlp_norm="post_attention_layernorm", fed_norm="post_mlp_layernorm"
    )
    architecture = "Glm4ForCausalLM"
    fixed: ClassVar[dict[str, Any]] = {"norm_place": "both"}
