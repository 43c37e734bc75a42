"""LoRA."""

from __future__ import annotations

from typing import cast

from pydantic import PositiveInt

from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.adapters.low_rank import LowRankLinear
from penstock.models.decoder import Decoder
from penstock.policy import policy
from penstock.train.tuners.contract import LowRank


@policy("train.tuner", "lora")
class LoRA(LowRank):
    """Trains B and A in W + (alpha / rank) B A for the matrices W of the blocks, which stay (Hu et al., 2021).

    ``targets`` are the names of the matrices as they end in folders of the model's family, such as ``q_proj``; empty
    takes all of attention and of dense feed-forward blocks. Experts and routers stay as they are. The adapter is
    written as PEFT reads it. Where the model's matrices are quantized, and stay so, this is QLoRA (Dettmers et al.,
    2023). Not built: dropout; optimizer states that are moved out of a GPU's memory.
    """

    rank: PositiveInt = 16
    targets: tuple[str, ...] = ()

    def attach(self, model: Decoder, seed: int) -> None:
        layers = low_rank.chosen(model, hub.family_of(model), self.targets)
        model.requires_grad_(False)
        for name, (pieces, places) in layers.items():
            base = cast(low_rank.Base, model.get_submodule(name))
            scale, like = self.alpha / self.rank, model.embedding.weight
            layer = LowRankLinear(base, pieces, places, self.rank, scale, like)
            layer.initialize(seed, name)
            low_rank.attach(model, name, layer)
