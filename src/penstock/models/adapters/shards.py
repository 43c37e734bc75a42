"""Low-rank additions that are put together from shards of pools, which the layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.core.randomness import torch_generator
from penstock.models.adapters.low_rank import Base, LowRankLinear, Piece


class Pool(nn.Module):
    """The numbers of the A's and the B's of one kind of matrix, [out, in], in ``layers`` layers.

    Each layer has ``private`` vectors of its own, and all layers share the others of ``budget`` vectors a layer. A
    vector is ``cuts`` shards, or as many as divide its length.

    Attributes:
        a, b: [budget * layers * cuts, in / cuts] and [budget * layers * cuts, out / cuts]: the shards, the shared ones
            first.
    """

    def __init__(self, like: Tensor, inputs: int, rows: int, layers: int, budget: int, private: int, cuts: int) -> None:
        super().__init__()
        self.layers, self.shared, self.private = layers, (budget - private) * layers, private
        self.inputs, self.rows = inputs, rows
        self.cuts = {"a": math.gcd(cuts, self.inputs), "b": math.gcd(cuts, rows)}
        for name, size in (("a", self.inputs), ("b", rows)):
            shards = torch.zeros(budget * layers * self.cuts[name], size // self.cuts[name])
            self.register_parameter(name, nn.Parameter(shards.to(like)))

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """Draws A's shards as LoRA draws A, and makes B's zero, so that nothing is added at first."""
        a, bound = self.get_parameter("a"), 1 / math.sqrt(self.inputs)
        drawn = torch.rand(a.shape, generator=torch_generator(seed, f"mos/{name}"))
        a.copy_((2 * drawn - 1) * bound)
        self.get_parameter("b").zero_()

    def picked(self, which: str, layer: int, rank: int, seed: int, name: str) -> Tensor:
        """The numbers of the shards, [rank * cuts], that make the A ("a") or the B ("b") of a layer: its own vectors
        first, and then shards of all in random order, none a second time before each was taken."""
        cuts = self.cuts[which]
        shared, wanted = self.shared * cuts, (rank - self.private) * cuts
        own = shared + layer * self.private * cuts + torch.arange(self.private * cuts)
        generator = torch_generator(seed, f"mos/{name}/{layer}/{which}")
        rounds = range(-(-wanted // shared) if wanted else 0)
        drawn = [torch.randperm(shared, generator=generator) for _ in rounds]
        return torch.cat([own, *drawn])[: rank * cuts]


class ShardedLinear(LowRankLinear):
    """A :class:`LowRankLinear` whose A and B are put together from pools.

    Args:
        base, pieces, scale, like: as there.
        pools: those of its pieces that have an addition, by their places.
        layer: its number among those that share them.
        rank: of the additions.
        seed: of the choice of shards.
    """

    def __init__(
        self,
        base: Base,
        pieces: Sequence[Piece],
        pools: dict[int, tuple[str, Pool]],
        layer: int,
        rank: int,
        scale: float,
        like: Tensor,
        seed: int,
    ) -> None:
        super().__init__(base, pieces, [], rank, scale, like)
        vars(self)["pools"] = {place: pool for place, (_, pool) in pools.items()}  # no submodules: the decoder has them
        for place, (name, pool) in pools.items():
            for which in ("a", "b"):
                picked = pool.picked(which, layer, rank, seed, name)
                if not like.is_meta:  # where the weights get their memory later, these numbers are real already
                    picked = picked.to(like.device)
                self.register_buffer(f"{which}{place}", picked, persistent=False)

    def additions(self) -> dict[int, tuple[Tensor, Tensor]]:
        pools: dict[int, Pool] = vars(self)["pools"]
        return {
            place: (self._made(pool, "a", place, pool.inputs), self._made(pool, "b", place, pool.rows).T)
            for place, pool in pools.items()
        }

    def _made(self, pool: Pool, which: str, place: int, size: int) -> Tensor:
        """The vectors, [rank, size], that the picked shards make."""
        return pool.get_parameter(which)[self.get_buffer(f"{which}{place}")].reshape(self.rank, size)
