"""GLM-4: one matrix for gate and up, half of each head turned, by neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS, TENSORS, Lineage
from penstock.models.families.phi3 import FUSED
from penstock.policy import policy


@policy("model.family", "glm")
class Glm(Lineage):
    """GLM-4 9B, the first, and GLM-Edge."""

    tensors = TENSORS | FUSED
    architecture = "GlmForCausalLM"
    fields = FIELDS | {"qkv_bias": "attention_bias"}
    rotation: ClassVar[dict[str, Any]] = {"interleaved": True}
    partial = True
    defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 128,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-07,
    }
