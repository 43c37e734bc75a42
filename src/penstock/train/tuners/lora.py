"""LoRA."""

from __future__ import annotations

from typing import cast

from pydantic import PositiveInt

from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.adapters.low_rank import LowRankLinear
from penstock.models.decoder import Decoder
from penstock.models.linear import Linear
from penstock.policy import policy
from penstock.train.tuners.contract import LowRank


@policy("train.tuner", "lora")
class LoRA(LowRank):
    """Trains B and A in W + (alpha / rank) B A for the matrices W of the blocks, which stay (Hu et al., 2021).

    ``targets`` are the names of the matrices as they end in folders of the model's family, such as ``q_proj``; empty
    takes all of attention and of dense feed-forward blocks. Experts and routers stay as they are. The adapter is
    written as PEFT reads it. Not built: dropout.
    """

    rank: PositiveInt = 16
    targets: tuple[str, ...] = ()

    def attach(self, model: Decoder, seed: int) -> None:
        layers = low_rank.chosen(model, hub.family_of(model), self.targets)
        model.requires_grad_(False)
        for name, (pieces, places) in layers.items():
            base = cast(Linear, model.get_submodule(name))
            layer = LowRankLinear(base, pieces, places, self.rank, self.alpha / self.rank)
            layer.initialize(seed, name)
            low_rank.attach(model, name, layer)
