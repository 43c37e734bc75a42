"""Command R7B and A: attention and feed-forward side by side, and rotation only where there is a window."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import FIELDS, Lineage, whole_heads
from penstock.models.families.windows import all_but_every, windows_from_hub, windows_to_hub
from penstock.policy import policy


@policy("model.family", "cohere2")
class Cohere2(Lineage):
    """Command R7B, Command A and their like."""

    architecture = "Cohere2ForCausalLM"
    fields = FIELDS | {
        "norm_eps": "layer_norm_eps",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "logits_scale": "logit_scale",
    }
    fixed: ClassVar[dict[str, Any]] = {"norm": "layer", "norm_place": "parallel"}
    rotation: ClassVar[dict[str, Any]] = {"interleaved": True}
    defaults: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": None,
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    }
    example: ClassVar[dict[str, Any]] = {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        whole_heads(hub)
        count = hub["num_hidden_layers"]
        windows = windows_from_hub(hub, all_but_every(hub["sliding_window_pattern"], count))
        windowed = windows.get("windowed_layers", ())
        return {**windows, "unrotated_layers": [layer for layer in range(count) if layer not in windowed]}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return windows_to_hub(config)
