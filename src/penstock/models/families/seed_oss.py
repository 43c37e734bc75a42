"""Seed-OSS: Llama with biases of its own for the output projection."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS, Lineage
from penstock.policy import policy


@policy("model.family", "seed_oss")
class SeedOss(Lineage):
    """Seed-OSS 36B."""

    architecture = "SeedOssForCausalLM"
    fields = FIELDS | {"qkv_bias": "attention_bias", "output_bias": "attention_out_bias", "mlp_bias": "mlp_bias"}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    }
    example: ClassVar[dict[str, Any]] = {"mlp_bias": True}
