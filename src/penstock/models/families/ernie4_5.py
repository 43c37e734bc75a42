"""ERNIE 4.5: Llama whose heads are turned by neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS, Lineage
from penstock.policy import policy


@policy("model.family", "ernie4_5")
class Ernie(Lineage):
    """ERNIE 4.5 0.3B, the dense one."""

    architecture = "Ernie4_5ForCausalLM"
    fields = FIELDS | {"qkv_bias": "use_bias", "output_bias": "use_bias", "mlp_bias": "use_bias"}
    rotation: ClassVar[dict[str, Any]] = {"interleaved": True}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    }
    example: ClassVar[dict[str, Any]] = {"use_bias": True}
