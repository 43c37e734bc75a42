"""The contract ``train.tuner``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveFloat
from torch import Tensor

from penstock.data.loader import Batch
from penstock.models import hub
from penstock.models.adapters import low_rank, peft
from penstock.models.adapters.peft import Adapter
from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder
from penstock.models.quantized import packed_layers
from penstock.policy import Policy, contract
from penstock.train.objectives.contract import Objective


@contract(
    "train.tuner",
    law="attached, the model computes what it did; what is trained gets a gradient, and nothing else changes; "
    "gradients equal differences of the loss; merged, a plain model computes what the tuned one does, or merging is "
    "refused; where something was added, what was there before is there bit for bit when that is removed; beside a "
    "base that stays quantized, all of this is as beside the numbers that it stands for",
)
class Tuner(Policy):
    """Which weights of a model are trained: its own, or others that are added to it.

    Attributes:
        adds: whether it trains weights beside the model's own, which stay as they are.
        merges: whether a plain model can compute what the tuned one does.
    """

    adds: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    @property
    def packs(self) -> bool:
        """Whether quantized matrices of the model may stay as they are stored."""
        return False

    def attach(self, model: Decoder, seed: int) -> None:
        """Prepares ``model``, in place: what has ``requires_grad`` from then on is trained.

        Args:
            model: on its device, plain.
            seed: for weights that are added.

        Raises:
            ConfigError: the model has nothing of what the policy trains.
        """
        raise NotImplementedError

    def detach(self, model: Decoder) -> None:
        """Removes what was added, and makes all weights trainable again."""
        model.requires_grad_(True)

    def loss(self, objective: Objective, model: Any, batch: Batch, context: AttentionContext) -> Tensor:
        """The summed loss of ``batch``, as the objective gives it, with what the policy adds to it. ``model`` is what
        the objective takes."""
        return objective.loss(model, batch, context)

    def merged(self, model: Decoder) -> Decoder:
        """A plain model that computes what ``model`` does; ``model`` itself where nothing is added.

        Raises:
            UsageError: none can, as :attr:`merges` says.
        """
        return model

    def exported(self, model: Decoder, base: str) -> Decoder | Adapter:
        """What a run's folders hold, and are opened by: the model, merged, or what is added to ``base`` alone."""
        return self.merged(model)

    def write(self, model: Decoder, folder: Path, base: str) -> None:
        """Writes what was added to ``base`` into the empty ``folder``, where :attr:`adds`."""
        raise NotImplementedError


class LowRank(Tuner):
    """Adds products of two thin matrices to matrices of the model, and writes them as PEFT does where it knows them.

    Attributes:
        alpha: over the rank, what a product is multiplied by.
        unpack: whether quantized matrices of the model become plain numbers, which what was trained can be merged into;
            else they stay as they are stored, as in QLoRA (Dettmers et al., 2023), and folders hold what was trained
            alone.
    """

    adds: ClassVar[bool] = True

    alpha: PositiveFloat = 32.0
    unpack: bool = False

    @property
    def packs(self) -> bool:
        return not self.unpack

    def detach(self, model: Decoder) -> None:
        low_rank.detach(model)
        super().detach(model)

    def merged(self, model: Decoder) -> Decoder:
        return low_rank.merged(model)

    def added(self, model: Decoder, base: str) -> Adapter:
        """What was added to ``base`` in ``model``."""
        return peft.taken_from(model, base, self.alpha, hub.family_of(model))

    def exported(self, model: Decoder, base: str) -> Decoder | Adapter:
        stays = next(packed_layers(model), None) is not None
        return self.added(model, base) if stays or not self.merges else self.merged(model)

    def write(self, model: Decoder, folder: Path, base: str) -> None:
        self.added(model, base).write(folder)
