"""A folder that several processes read or write together, each its own part of the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.files import write_json
from penstock.models.blank import without_weights
from penstock.models.decoder import Decoder
from penstock.models.families.mapping import pieces, placed, views_on
from penstock.models.formats.safetensors import WEIGHTS_INDEX
from penstock.models.hub.description import describe
from penstock.models.hub.family import family_of, remember
from penstock.models.hub.folders import CONFIG, resolve
from penstock.models.hub.saving import config_of, part_name, save_file
from penstock.models.hub.weights import check_weights, require_shape, routed_adapter, weights_of


def blank(source: str | Path) -> Decoder:
    """The like of what :func:`~penstock.models.hub.load` gives, whose weights lie on the meta device:
    :func:`read_weights` has them.

    Raises:
        UsageError, ModelError: as :func:`~penstock.models.hub.load`; or it is an adapter that cannot be merged.
    """
    folder = resolve(source)
    if routed_adapter(folder) is not None:
        raise UsageError(
            f"{folder} is an adapter that adds something else for each token, and is not divided among devices",
            hint="Name its base.",
        )
    described = describe(folder)
    with without_weights():
        decoder = Decoder(described.config)
    check_weights(described, weights_of(described), views_on(decoder, described.family))
    remember(decoder, described)
    return decoder


def read_weights(source: str | Path, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those of the weights in a folder that have one of ``names`` in a decoder, one at a time, in ``dtype`` and in the
    host's memory.

    Raises:
        UsageError, ModelError: as :func:`~penstock.models.hub.load`.
    """
    described = describe(resolve(source))
    weights = weights_of(described)
    with without_weights():
        decoder = Decoder(described.config)
    for name, meta in decoder.named_parameters():
        if name in names:
            weight = torch.empty(meta.shape, dtype=dtype)
            views = dict(pieces(described.config, described.family, name, weight))
            for place, tensor in weights.read(views.keys()):
                require_shape(place, weights, tensor.shape, views[place].shape)
                views[place].copy_(tensor)
            yield name, weight


def save_part(decoder: Decoder, folder: Path, weights: Mapping[str, Tensor], part: int, parts: int) -> list[Path]:
    """Writes some of the weights of a decoder's folder, which several processes write together, each its own ``part``;
    :func:`save_rest` completes it. Returns the files.

    Args:
        decoder: the model, without additions; only its shape counts.
        folder: exists.
        weights: by their names in the decoder, whole, in the host's memory and in the dtype to be stored.
        part: which of the ``parts``, from 0.
        parts: how many there are.

    Raises:
        PenstockError: the disk is full.
    """
    family = family_of(decoder)
    named = (item for name, weight in weights.items() for item in pieces(decoder.config, family, name, weight))
    tensors = {place: view.contiguous() for place, view in named}
    if not tensors:
        return []
    path = folder / part_name(part, parts)
    save_file(tensors, path)
    return [path]


def save_rest(decoder: Decoder, folder: Path, owners: Mapping[str, int], parts: int, dtype: torch.dtype) -> None:
    """Writes what :func:`save_part` leaves out: config.json, and which of the ``parts`` has which weight, which follows
    from those that have a decoder's parameters, ``owners``."""
    family = family_of(decoder)
    with without_weights():
        plain = Decoder(decoder.config)
    views = list(placed(plain, family))
    places = {place: part_name(owners[name], parts) for name, place, _ in views}
    total = sum(view.numel() * dtype.itemsize for _, _, view in views)
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / CONFIG, config_of(decoder, family, dtype))
