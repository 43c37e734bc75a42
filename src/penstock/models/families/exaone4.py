"""EXAONE 4: norms behind the blocks and on queries and keys, and no rotation where there is no window."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.config import DecoderConfig
from penstock.models.families.contract import HubConfig
from penstock.models.families.lineage import Lineage
from penstock.models.families.olmo2 import Olmo2
from penstock.models.families.windows import FULL, all_but_every, windows_from_hub, windows_to_hub
from penstock.policy import policy


@policy("model.family", "exaone4")
class Exaone4(Lineage):
    """EXAONE 4.0: 1.2B (no windows, all layers rotated) and 32B."""

    tensors = Olmo2.tensors
    architecture = "Exaone4ForCausalLM"
    fixed: ClassVar[dict[str, Any]] = {"norm_place": "after", "qk_norm": "head"}
    defaults: ClassVar[dict[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    }
    example: ClassVar[dict[str, Any]] = {"sliding_window": 5, "sliding_window_pattern": 2}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        count = hub["num_hidden_layers"]
        if hub["sliding_window"] is None:
            return {}
        usual = all_but_every(hub["sliding_window_pattern"], count)
        kinds = hub["layer_types"] or usual
        windows = windows_from_hub(hub, usual)
        return {**windows, "unrotated_layers": [layer for layer in range(count) if kinds[layer] == FULL]}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        keys = windows_to_hub(config)
        return keys if config.window or config.unrotated_layers else keys | {"sliding_window": None}
