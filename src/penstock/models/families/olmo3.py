"""OLMo 3: OLMo 2 with sliding windows in three layers of four, whose rotation is not scaled."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.olmo2 import Olmo2
from penstock.models.families.rope import nested_to_hub, ropes_from_hub
from penstock.models.families.windows import all_but_every, windows_from_hub, windows_to_hub
from penstock.policy import policy


@policy("model.family", "olmo3")
class Olmo3(Olmo2):
    """OLMo 3: 7B and 32B."""

    architecture = "Olmo3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Olmo2.defaults,
        "rope_theta": 500_000.0,
        "sliding_window": 4096,
        "layer_types": None,
    }
    example: ClassVar[dict[str, Any]] = {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    }

    def rope_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return ropes_from_hub(hub)

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        # Nested, since the classic keys leave the base of layers with a window to the reader.
        rope, local = config.rope, config.local_rope or config.rope
        return {
            "rope_parameters": {"full_attention": nested_to_hub(rope), "sliding_attention": nested_to_hub(local)},
        }

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        return windows_from_hub(hub, all_but_every(4, hub["num_hidden_layers"]))

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return windows_to_hub(config)
