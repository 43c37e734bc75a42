"""Qwen3: norms on queries and keys instead of biases."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS
from penstock.models.families.qwen2 import LAST_WINDOWS, Qwen2
from penstock.policy import policy


@policy("model.family", "qwen3")
class Qwen3(Qwen2):
    """Qwen3, dense; ``attention_bias`` gives biases to all four projections."""

    architecture = "Qwen3ForCausalLM"
    rank = 2
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
    fixed: ClassVar[dict[str, Any]] = {"qk_norm": "head"}
    defaults: ClassVar[dict[str, Any]] = {"head_dim": 128, "attention_bias": False, **LAST_WINDOWS}
    example: ClassVar[dict[str, Any]] = {**Qwen2.example, "attention_bias": True}
