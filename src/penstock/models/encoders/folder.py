"""Encoders from Hugging Face folders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from penstock.core.errors import ModelError
from penstock.core.files import read_json
from penstock.models.blank import without_weights
from penstock.models.encoders.classifier import Classifier
from penstock.models.encoders.contract import EncoderFamily
from penstock.models.encoders.encoder import Encoder
from penstock.models.families.contract import HubConfig
from penstock.models.families.mapping import require_one_label
from penstock.models.formats.renamed import Renamed
from penstock.models.formats.safetensors import Safetensors
from penstock.policy import create, index

CONFIG = "config.json"


def is_encoder(folder: Path) -> bool:
    """Whether the model in ``folder`` is one of the families of encoders."""
    return index().find("model.encoder", str(_described(folder).get("model_type"))) is not None


def is_classifier(folder: Path) -> bool:
    """Whether the encoder in ``folder`` has a head that makes numbers of texts or pairs of them."""
    told = _described(folder).get("architectures") or ()
    return any(str(each).endswith("ForSequenceClassification") for each in told)


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder in ``folder``.

    Raises:
        ModelError: there is none, or the folder is damaged.
    """
    if is_classifier(folder):
        raise ModelError(
            f"{folder / CONFIG} describes a model that makes a number of a text or a pair of them, and no vectors",
            hint="penstock serve offers it at /v1/score and /v1/rerank.",
        )
    family, hub = _family(folder)
    with _explained(folder), without_weights():
        encoder = Encoder(family.config_from_hub(hub))
    _blank(encoder, device, dtype)
    encoder.rotary.to(device)
    _fill(dict(_places(encoder, family)), folder, family.weight)
    return encoder.eval()


def load_classifier(folder: Path, device: torch.device, dtype: torch.dtype) -> Classifier:
    """The cross-encoder in ``folder``.

    Raises:
        ModelError: there is none, the folder is damaged, or it makes more than one number of a text.
    """
    family, hub = _family(folder)
    if not family.head_tensors:
        raise ModelError(
            f"{folder / CONFIG} describes a classifier, and those of {family.policy_name} are not supported"
        )
    require_one_label(folder / CONFIG, hub, 2)
    with _explained(folder), without_weights():
        classifier = Classifier(Encoder(family.config_from_hub(hub)), family.head_from_hub(hub))
    _blank(classifier, device, dtype)
    classifier.encoder.rotary.to(device)
    places = dict(_places(classifier.encoder, family))
    for ours, theirs in family.head_tensors.items():
        module = classifier.get_submodule(ours)
        places |= {f"{theirs}.{part}": each.data for part, each in module.named_parameters()}
    _fill(places, folder, family.head_weight)
    return classifier.eval()


def _family(folder: Path) -> tuple[EncoderFamily, HubConfig]:
    hub = HubConfig(_described(folder))
    family = create("model.encoder", str(hub["model_type"]))
    assert isinstance(family, EncoderFamily)
    return family, hub


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValidationError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / CONFIG} describes no encoder: {error}") from error


def _blank(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives ``model`` memory for its weights."""
    blank = {name: torch.empty(each.shape, dtype=dtype, device=device) for name, each in model.named_parameters()}
    model.load_state_dict(blank, assign=True)


def _described(folder: Path) -> dict[str, Any]:
    told = read_json(folder / CONFIG)
    if not isinstance(told, dict):
        raise ModelError(f"{folder / CONFIG} is no table")
    return told


@torch.no_grad()
def _fill(places: Mapping[str, Tensor], folder: Path, named: Callable[[str], str | None]) -> None:
    """Reads the weights of ``folder`` into ``places``, by what they are ``named`` there."""
    weights = Renamed(Safetensors(folder), named)
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
