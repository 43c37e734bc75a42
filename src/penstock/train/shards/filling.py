"""Shards that are filled layer by layer, so that no process ever holds more of the model whole than one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.blank import without_weights
from penstock.models.decoder import Decoder
from penstock.parallel.shard import Meshes, shard
from penstock.train.precision import Precision
from penstock.train.shards.division import Division

#: Gives weights by their names, one at a time, float32 in the host's memory.
Source = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]


def source_of(model: Decoder, folder: Path | str | None, seed: int) -> Source:
    """Where the weights of ``model`` come from: a model folder, as :func:`~penstock.models.hub.resolve` knows it, or
    chance. A scalar head that the folder does not have is drawn, too."""

    def drawn(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            weight = torch.empty(model.get_parameter(name).shape)
            model.initialize_one(name, weight, seed)
            yield name, weight

    def stored(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        assert folder is not None
        given = model.config.scalar_head and not hub.read_config(hub.resolve(folder)).scalar_head
        new = {"head.weight"} & set(names) if given else set[str]()
        yield from hub.read_weights(folder, set(names) - new, torch.float32)
        yield from drawn(new)

    return drawn if folder is None else stored


def fill(
    model: Decoder,
    meshes: Meshes,
    device: torch.device,
    precision: Precision,
    source: Source,
    seed: int,
    adds: bool,
    division: Division | None = None,
) -> None:
    """Gives ``model``, which is on the meta device, its weights, sharded over ``meshes``.

    Args:
        model: prepared: what it trains has ``requires_grad``; where its layers are divided, this process's share.
        meshes: of :func:`~penstock.parallel.shard.meshes_of`.
        device: this process's.
        precision: in bf16, layers round their weights when they put them together; those of a base that nothing is
            trained of are kept rounded.
        source: of the model's own weights.
        seed: of what was added to them.
        adds: whether what is trained was added to a base that stays. It is small, and whole in each process.
        division: of the layers.
    """
    rounds = precision == "bf16"
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad} if adds else set[str]()
    with without_weights():
        own = {name for name, _ in Decoder(model.config).named_parameters()}
    _take_place(model, {name: torch.empty(model.get_parameter(name).shape, device=device) for name in kept})
    low_rank.initialize(model, seed)
    for name, weight in source(kept & own):
        _take_place(model, {name: weight.to(device)})
    whole = {model.get_parameter(name) for name in kept}
    arithmetic = torch.bfloat16 if rounds and not adds else None
    dtype = torch.bfloat16 if rounds and adds else torch.float32
    done = set(kept)
    # An embedding that is no head, too, is needed at the very beginning and the very end alone.
    apart = [] if model.config.shares_head else [model.embedding]
    for unit in (*apart, *model.layers, model):
        parameters = {id(parameter) for parameter in unit.parameters()}
        names = [name for name, p in model.named_parameters() if id(p) in parameters and name not in done]
        for name, weight in source(names):
            share = weight if division is None else division.own(name, weight).contiguous()
            _take_place(model, {name: share.to(device, dtype)})
        done.update(names)
        if unit in model.layers:
            shard(unit, meshes.layers, whole, arithmetic)
        else:
            shard(unit, meshes.rest, whole, arithmetic, meshes.alike)


def _take_place(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Puts ``weights`` into the places of the parameters of their names, and into all others where these stand."""
    fresh = {
        id(old): nn.Parameter(weights[name], requires_grad=old.requires_grad)
        for name, old in model.named_parameters()
        if name in weights
    }
    for module in model.modules():
        for key, old in list(module.named_parameters(recurse=False)):
            if id(old) in fresh:
                setattr(module, key, fresh[id(old)])
