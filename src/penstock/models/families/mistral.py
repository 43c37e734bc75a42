"""Mistral: Llama's layout with a sliding window in every layer."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.families.lineage import FIELDS, Lineage
from penstock.policy import policy


@policy("model.family", "mistral")
class Mistral(Lineage):
    """Mistral 7B and its successors (``sliding_window`` null: none)."""

    architecture = "MistralForCausalLM"
    rank = 5
    fields = FIELDS | {"window": "sliding_window"}
    defaults: ClassVar[dict[str, Any]] = {"sliding_window": 4096}
    example: ClassVar[dict[str, Any]] = {"sliding_window": 5}
