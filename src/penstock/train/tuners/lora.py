"""LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

from pydantic import PositiveFloat, PositiveInt

from penstock.models import hub
from penstock.models.adapters import low_rank, peft
from penstock.models.adapters.low_rank import LowRankLinear
from penstock.models.decoder import Decoder
from penstock.models.linear import Linear
from penstock.policy import policy
from penstock.train.tuners.contract import Tuner


@policy("train.tuner", "lora")
class LoRA(Tuner):
    """Trains B and A in W + (alpha / rank) B A for the matrices W of the blocks, which stay (Hu et al., 2021).

    ``targets`` are the names of the matrices as they end in folders of the model's family, such as ``q_proj``; empty
    takes all of attention and of dense feed-forward blocks. Experts and routers stay as they are. The adapter is
    written as PEFT reads it. Not built: dropout.
    """

    adds: ClassVar[bool] = True

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: tuple[str, ...] = ()

    def attach(self, model: Decoder, seed: int) -> None:
        layers = low_rank.chosen(model, hub.family_of(model), self.targets)
        model.requires_grad_(False)
        for name, (pieces, places) in layers.items():
            base = cast(Linear, model.get_submodule(name))
            layer = LowRankLinear(base, pieces, places, self.rank, self.alpha / self.rank)
            layer.initialize(seed, name)
            low_rank.attach(model, name, layer)

    def detach(self, model: Decoder) -> None:
        low_rank.detach(model)
        super().detach(model)

    def merged(self, model: Decoder) -> Decoder:
        return low_rank.merged(model)

    def write(self, model: Decoder, folder: Path, base: str) -> None:
        peft.write(model, folder, base, self.alpha, hub.family_of(model))
