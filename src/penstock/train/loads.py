"""The loads of the experts over whole updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.models.decoder import Layer, MixtureOfExperts
from penstock.parallel.world import World
from penstock.train.folders import Trained


class Loads:
    """Gives the loss for balance its f: the share of the assignments that each expert got in the update before.

    An update may be computed in parts, one microbatch after another and by several processes, and each part has other
    shares. With the shares of a whole update the gradients of the parts add up to the gradient of the whole. They are
    constants in that gradient; so those of the update before do what this one's would do, which are known only once all
    parts have been computed. The first update knows none, and takes the load for even.

    Args:
        model: on its device; its sparse layers are given their loads, and count.
    """

    def __init__(self, model: Trained) -> None:
        self._moe, self._layers = model.config.moe, model.config.layers
        self._device = next(model.parameters()).device
        self._counts: dict[int, Tensor] = {}
        self._loads: dict[int, Tensor] = {}
        # A pipeline's part of a model has no layer in the places of those that others hold.
        for index, layer in enumerate(model.layers):
            if isinstance(layer, Layer) and isinstance(layer.mlp, MixtureOfExperts):
                block, experts = layer.mlp, layer.mlp.experts
                block.counts = self._counts[index] = torch.zeros(experts, dtype=torch.int64, device=self._device)
                block.load = self._loads[index] = torch.full((experts,), 1 / experts, device=self._device)

    def begin(self) -> None:
        """An update begins: nothing of it is counted yet."""
        for counts in self._counts.values():
            counts.zero_()

    def end(self, world: World) -> None:
        """All of an update is computed: what all processes counted is the load from now on. All of them call this."""
        if self._moe is None:
            return
        whole = torch.zeros(self._layers, self._moe.experts, dtype=torch.int64, device=self._device)
        for index, counts in self._counts.items():
            whole[index] = counts
        world.sum_([whole])
        for index, load in self._loads.items():
            load.copy_(whole[index] / whole[index].sum())  # in place: a compiled pass reads this memory

    def tensors(self) -> dict[str, Tensor]:
        """The load of each sparse layer that is here, by the name of its router's weight."""
        return {_name(index): load for index, load in self._loads.items()}

    def restore(self, loads: Mapping[str, Tensor]) -> None:
        """Takes the loads of those layers that are here, as :meth:`tensors` names them."""
        for index, load in self._loads.items():
            if _name(index) in loads:
                load.copy_(loads[_name(index)])


def _name(index: int) -> str:
    return f"layers.{index}.mlp.router.weight"
