"""The weights of a folder by their names in its family, and whether they are those that its config.json implies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.core.files import read_json
from penstock.models.adapters import peft, routed_folder
from penstock.models.adapters.folder import INDEX as ADAPTER_INDEX
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import Family
from penstock.models.families.mapping import SCALAR_HEAD
from penstock.models.formats.contract import Weights
from penstock.models.formats.renamed import Renamed
from penstock.models.formats.safetensors import STORED
from penstock.models.hub.description import Description
from penstock.models.hub.folders import CONFIG
from penstock.models.hub.multimodal import text_part
from penstock.models.hub.stored import stored_in

#: dtypes that weights may have, by their names in config.json.
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in STORED.values()}


def weights_of(described: Description) -> Weights:
    """The weights of a folder, those of a plain adapter merged into its base's as they are read.

    Raises:
        ModelError: a file is damaged, or holds what is not supported.
    """
    folder, family, config, raw = described
    if (folder / ADAPTER_INDEX).is_file():
        index = read_json(folder / ADAPTER_INDEX)
        base, adapter = Path(index["base"]), Path(index["adapter"])
        own = weights_of(described._replace(folder=base, raw=read_json(base / CONFIG)))
        if routed_folder.is_routed(adapter):
            return own
        found = peft.read_whole(adapter)
        additions = peft.named(found.additions, lambda name: family.weight(name, config))
        weights: Weights = peft.Adapted(own, additions, adapter)
        if found.head is None:
            return weights
        return peft.Judging(weights, found.head, family.tensors["head.weight"][0], adapter / peft.WEIGHTS)
    stored = Renamed(stored_in(folder, raw), lambda name: name if name == SCALAR_HEAD else family.weight(name, config))
    if config.layers > len(stored.headers):  # said before so many layers are made
        raise ModelError(
            f"{folder} holds {len(stored.headers)} weights, and its {CONFIG} implies {config.layers:,} layers",
            hint="Its weights are not those of the model that this describes.",
        )
    return stored


def routed_adapter(folder: Path) -> Path | None:
    """The adapter of a model folder, where it is one that nothing can be merged of."""
    if not (folder / ADAPTER_INDEX).is_file():
        return None
    adapter = Path(read_json(folder / ADAPTER_INDEX)["adapter"])
    return adapter if routed_folder.is_routed(adapter) else None


def tied_head(config: DecoderConfig, family: Family) -> str | None:
    """The name of a head that a folder may hold although it is the embedding again."""
    return family.tensors["head.weight"][0] if config.shares_head else None


def check_weights(described: Description, weights: Weights, wanted: Mapping[str, Tensor]) -> None:
    """Compares the names, shapes and dtypes that are there with those that config.json implies.

    Args:
        described: the folder.
        weights: what is stored in it.
        wanted: weights of the shapes that are implied, on any device, by their names in its family.

    Raises:
        ModelError: they differ.
    """
    folder, stored, optional = described.folder, weights.headers, tied_head(described.config, described.family)
    for which, names in (("lacks", wanted.keys() - stored), ("also has", stored.keys() - wanted.keys() - {optional})):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{folder} {which} {', '.join(sorted(names)[:3])}{more}",
                hint=f"Its weights are not those of the model that its {CONFIG} describes.",
            )
    for name, (path, shape, dtype, _) in stored.items():
        if name in wanted and not _fits(shape, wanted[name].shape):
            raise ModelError(f"{name} in {path} is {_told(shape)}, but {CONFIG} implies {list(wanted[name].shape)}")
        if dtype not in weights.dtypes:
            known = ", ".join(weights.dtypes)
            raise ModelError(f"{name} in {path} holds {dtype}", hint=f"Weights must be one of {known}.")


def _fits(shape: tuple[int, ...], wanted: torch.Size) -> bool:
    """Whether a weight is of the shape that is ``wanted``, as far as its header tells (-1: it does not)."""
    known = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(size in (-1, other) for size, other in known)


def _told(shape: tuple[int, ...]) -> str:
    """A shape as far as a header tells it."""
    return f"[{', '.join('?' if size == -1 else str(size) for size in shape)}]"


def in_few_bits(weights: Weights) -> bool:
    """Whether some of the weights are not stored as plain numbers."""
    return any(header.dtype not in STORED for header in weights.headers.values())


def stated_dtype(described: Description, weights: Weights) -> torch.dtype:
    """The dtype that a folder states, or else that of its stored tensors."""
    text = text_part(described.raw)
    stated = text.get("dtype") or text.get("torch_dtype")
    if stated is None:
        return next((STORED[each.dtype] for each in weights.headers.values() if each.dtype in STORED), torch.float32)
    if stated not in NAMED:
        raise ModelError(f"{described.folder / CONFIG}: the dtype {stated!r} is none of {', '.join(NAMED)}")
    return NAMED[stated]


def require_shape(name: str, weights: Weights, shape: tuple[int, ...], wanted: torch.Size) -> None:
    """Refuses a stored weight that has another shape than config.json implies."""
    if tuple(shape) != tuple(wanted):
        raise ModelError(
            f"{name} in {weights.headers[name].path} is {list(shape)}, but {CONFIG} implies {list(wanted)}"
        )
