"""StarCoder2: layer norms and biases everywhere, and a feed-forward block without a gate."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS, HUB_LAYER, LAYER, TENSORS, Lineage
from penstock.policy import policy

BIASED_NORMS = {
    f"{LAYER}.attention_norm.bias": (f"{HUB_LAYER}.input_layernorm.bias",),
    f"{LAYER}.mlp_norm.bias": (f"{HUB_LAYER}.post_attention_layernorm.bias",),
    "norm.bias": ("model.norm.bias",),
}


@policy("model.family", "starcoder2")
class Starcoder2(Lineage):
    """StarCoder2: 3B, 7B and 15B."""

    tensors = (
        TENSORS
        | BIASED_NORMS
        | {f"{LAYER}.mlp.gate_up.{part}": (f"{HUB_LAYER}.mlp.c_fc.{part}",) for part in ("weight", "bias")}
        | {f"{LAYER}.mlp.down.{part}": (f"{HUB_LAYER}.mlp.c_proj.{part}",) for part in ("weight", "bias")}
    )
    architecture = "Starcoder2ForCausalLM"
    fields = FIELDS | {
        "norm_eps": "norm_epsilon",
        "window": "sliding_window",
        "qkv_bias": "use_bias",
        "output_bias": "use_bias",
        "mlp_bias": "use_bias",
    }
    fixed: ClassVar[dict[str, Any]] = {"norm": "layer", "norm_bias": True, "gated": False}
    defaults: ClassVar[dict[str, Any]] = {
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": None,
    }
    example: ClassVar[dict[str, Any]] = {"sliding_window": 5}
