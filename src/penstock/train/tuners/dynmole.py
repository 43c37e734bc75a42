"""DynMoLE."""

from __future__ import annotations

from typing import ClassVar, Self, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from penstock.core.errors import ConfigError
from penstock.data.loader import Batch
from penstock.models import hub
from penstock.models.adapters import low_rank, routed_folder
from penstock.models.adapters.peft import Adapter
from penstock.models.adapters.routed import Mixture, RoutedLinear, routed, unevenness
from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Objective
from penstock.train.tuners.contract import LowRank


@policy("train.tuner", "dynmole", papers=[116])
class DynMoLE(LowRank):
    """Trains several LoRA experts for each matrix of the blocks, and a router of each matrix that chooses among them.

    From the paper: a token whose router is uncertain, by a Tsallis entropy of its probabilities above ``threshold``,
    takes all experts, each weighted by its probability; others take the most probable ones, by ``top_p`` and no fewer
    than ``top_k``; and the entropy is a part of the loss, with ``entropy_weight``. As the authors' code has it: the
    entropy is compared as it stands, up to (1 - n^(1 - q)) / (q - 1) for n experts and q = ``entropy_index``; the
    experts of ``top_p`` are no more probable than that together; weights of a part are not scaled up to 1; the loss
    also has, with ``balance_weight``, n sum_e f_e p_e for an even load, where f and p are the means of the experts'
    weights and probabilities; and so are the defaults of how experts are chosen, and of both weights in the loss. Our
    reading: each matrix has a router of its own; entropy and load are means over the tokens of a microbatch that are
    predicted, and then over all routers, and for objectives over pairs they count once a pair. Ours are the folder,
    and the other defaults.

    No plain model computes the same, so nothing is merged: what the run leaves is a folder of its own kind, which opens
    on the base that it names. All experts are computed, and weighted by 0 where they are not taken. Not built: kernels
    that skip experts; several such adapters in one batch; reward models.
    """

    merges: ClassVar[bool] = False

    experts: int = Field(8, ge=2)
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    threshold: NonNegativeFloat = 0.9
    entropy_index: float = Field(1.1, ge=1)
    top_p: float = Field(0.75, gt=0, le=1)
    top_k: PositiveInt = 2
    entropy_weight: NonNegativeFloat = 0.01
    balance_weight: NonNegativeFloat = 0.001
    targets: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) is above experts ({self.experts})")
        return self

    @property
    def mixture(self) -> Mixture:
        """How tokens choose among the experts."""
        return Mixture(self.experts, self.entropy_index, self.threshold, self.top_p, self.top_k)

    def attach(self, model: Decoder, seed: int) -> None:
        if model.config.scalar_head:
            raise ConfigError("the tuner dynmole trains no reward models: set tuner=lora")
        layers = low_rank.chosen(model, hub.family_of(model), self.targets)
        model.requires_grad_(False)
        for name, (pieces, places) in layers.items():
            base = cast(low_rank.Base, model.get_submodule(name))
            scale, like = self.alpha / self.rank, model.embedding.weight
            layer = RoutedLinear(base, pieces, places, self.rank, scale, like, self.mixture)
            layer.initialize(seed, name)
            low_rank.attach(model, name, layer)

    def loss(self, objective: Objective, model: Decoder, batch: Batch, context: AttentionContext) -> Tensor:
        layers = [layer for _, layer in routed(model)]
        for layer in layers:
            layer.choices = []
        loss = objective.loss(model, batch, context)
        found = [chosen for layer in layers for chosen in layer.choices or []]
        for layer in layers:
            layer.choices = None  # a pass that is computed again for its gradient leaves nothing
        # Means, written so that their shapes do not depend on how many tokens are predicted.
        predicted = (batch.targets != IGNORE).flatten().to(found[0].entropy.dtype)
        shares = (predicted * predicted.numel() / predicted.sum().clamp(min=1))[:, None]
        uncertain = torch.stack([chosen.entropy.flatten() for chosen in found]) @ shares / predicted.numel()
        uneven = [unevenness(*(each.flatten(0, -2) * shares for each in chosen[:2])) for chosen in found]
        added = self.entropy_weight * uncertain.mean() + self.balance_weight * torch.stack(uneven).mean()
        return loss + objective.count(batch) * added

    def added(self, model: Decoder, base: str) -> Adapter:
        return routed_folder.taken_from(model, base, self.alpha)
