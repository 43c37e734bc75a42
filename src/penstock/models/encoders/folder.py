"""Encoders from Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from penstock.core.errors import ModelError
from penstock.core.files import read_json
from penstock.models.blank import without_weights
from penstock.models.encoders.contract import EncoderFamily
from penstock.models.encoders.encoder import Encoder
from penstock.models.families.contract import HubConfig
from penstock.models.formats.renamed import Renamed
from penstock.models.formats.safetensors import Safetensors
from penstock.policy import create, index

CONFIG = "config.json"


def is_encoder(folder: Path) -> bool:
    """Whether the model in ``folder`` is one of the families of encoders."""
    return index().find("model.encoder", str(_described(folder).get("model_type"))) is not None


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder in ``folder``.

    Raises:
        ModelError: there is none, or the folder is damaged.
    """
    hub = HubConfig(_described(folder))
    if any(str(each).endswith("ForSequenceClassification") for each in hub.get("architectures") or ()):
        raise ModelError(
            f"{folder / CONFIG} describes a model that classifies texts or pairs of them: its head is not supported",
            hint="Name an encoder that makes vectors; /v1/rerank and /v1/score compare those.",
        )
    family = create("model.encoder", str(hub["model_type"]))
    assert isinstance(family, EncoderFamily)
    try:
        config = family.config_from_hub(hub)
    except (ValidationError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / CONFIG} describes no encoder: {error}") from error
    with without_weights():
        encoder = Encoder(config)
    blank = {name: torch.empty(each.shape, dtype=dtype, device=device) for name, each in encoder.named_parameters()}
    encoder.load_state_dict(blank, assign=True)
    encoder.rotary.to(device)
    _fill(encoder, family, folder)
    return encoder.eval()


def _described(folder: Path) -> dict[str, Any]:
    told = read_json(folder / CONFIG)
    if not isinstance(told, dict):
        raise ModelError(f"{folder / CONFIG} is no table")
    return told


@torch.no_grad()
def _fill(encoder: Encoder, family: EncoderFamily, folder: Path) -> None:
    weights = Renamed(Safetensors(folder), family.weight)
    places = dict(_places(encoder, family))
    for which, names in (("lacks", places.keys() - weights.headers), ("also has", weights.headers.keys() - places)):
        if names:
            raise ModelError(
                f"{folder} {which} {', '.join(sorted(names)[:3])}",
                hint=f"Its weights are not those of the model that its {CONFIG} describes.",
            )
    for name, tensor in weights.read(places.keys()):
        if tensor.shape != places[name].shape:
            raise ModelError(f"{name} in {folder} is {list(tensor.shape)}, and {list(places[name].shape)} is expected")
        places[name].copy_(tensor)


def _places(encoder: nn.Module, family: EncoderFamily) -> Iterator[tuple[str, Tensor]]:
    """Where each tensor of a folder belongs."""
    for name, parameter in encoder.named_parameters():
        first, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        layered = first == "layers"
        theirs = family.tensors[f"layers.{{layer}}.{inner}" if layered else name]
        for each, view in zip(theirs, parameter.data.chunk(len(theirs)), strict=True):
            yield each.format(layer=number), view
