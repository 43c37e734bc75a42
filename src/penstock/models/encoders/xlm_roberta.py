"""XLM-RoBERTa (Conneau et al. 2019), and what was made of it: multilingual E5, BGE-M3."""

from __future__ import annotations

from typing import Any, ClassVar

from penstock.models.encoders.bert import Bert
from penstock.models.families.contract import HubConfig
from penstock.policy import policy


@policy("model.encoder", "xlm_roberta")
class XlmRoberta(Bert):
    """BERT's layers; the rows of the table of positions begin behind the padding's token."""

    prefix = "roberta."
    unused: ClassVar[tuple[str, ...]] = ("pooler.", "lm_head.", "classifier.")
    head_tensors: ClassVar[dict[str, str]] = {"dense": "classifier.dense", "out": "classifier.out_proj"}
    example: ClassVar[dict[str, Any]] = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-3}

    def first_place(self, hub: HubConfig) -> int:
        padding: int = hub.get("pad_token_id", 1)
        return padding + 1
