"""Mixture of shards."""

from __future__ import annotations

from typing import Self, cast

from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import nn

from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.adapters.shards import Pool, ShardedLinear
from penstock.models.decoder import Decoder
from penstock.policy import policy
from penstock.train.tuners.contract import LowRank


@policy("train.tuner", "mos", papers=[101])
class MixtureOfShards(LowRank):
    """Trains pools of shards, of which the A and the B of every layer's low-rank additions are put together.

    Matrices of one kind (all ``q_proj``, say) have a pool for their A's and one for their B's, with as many numbers as
    LoRA of the rank ``budget`` has in all layers. Each layer makes vectors for the larger ``rank`` of them. From the
    paper, against what is lost by sharing: a random subset of the shards for each layer; A and B choose apart; vectors
    are cut into ``shards``, which recur in other company; and ``private`` vectors a layer are its own. With all of them
    private it is LoRA. Our reading: private vectors count within the budget, the choice is drawn once, and no shard is
    taken twice by a layer before each was.

    The adapter is written as PEFT reads LoRA, of the full ``rank``, and served merged. Not built: kernels that compute
    many adapters in one batch from their pools.
    """

    rank: PositiveInt = 16
    budget: PositiveInt = 2
    shards: PositiveInt = 4
    private: NonNegativeInt = 1
    targets: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.private > min(self.budget, self.rank):
            raise ValueError(f"private ({self.private}) is above budget ({self.budget}) or rank ({self.rank})")
        if self.private == self.budget < self.rank:
            raise ValueError(f"all {self.budget} vectors a layer are private: no others are left for rank {self.rank}")
        return self

    def attach(self, model: Decoder, seed: int) -> None:
        layers = low_rank.chosen(model, hub.family_of(model), self.targets)
        model.requires_grad_(False)
        kinds: dict[str, list[str]] = {}
        like = model.embedding.weight
        for name, (pieces, places) in layers.items():
            for place in places:
                kinds.setdefault(self._kind(model, name, pieces[place]), []).append(name)
        pools = nn.ModuleDict()
        for kind, names in kinds.items():
            inputs, rows = map(int, kind.rpartition("_")[2].split("x"))
            pool = Pool(like, inputs, rows, len(names), self.budget, self.private, self.shards)
            pool.initialize(seed, kind)
            pools[kind] = pool
        for name, (pieces, places) in layers.items():
            found = {place: self._kind(model, name, pieces[place]) for place in places}
            own = {place: (kind, cast(Pool, pools[kind])) for place, kind in found.items()}
            base, number = cast(low_rank.Base, model.get_submodule(name)), kinds[next(iter(found.values()))].index(name)
            scale = self.alpha / self.rank
            low_rank.attach(model, name, ShardedLinear(base, pieces, own, number, self.rank, scale, like, seed))
        model.add_module(low_rank.POOLS, pools)

    @staticmethod
    def _kind(model: Decoder, name: str, piece: low_rank.Piece) -> str:
        """What the matrices are called that share a pool: by their names in a layer and their shapes."""
        return f"{piece.end}_{cast(low_rank.Base, model.get_submodule(name)).in_features}x{piece.rows}"
