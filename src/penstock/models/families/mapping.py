"""Between our parameter names and the names on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family

#: What folders call the head of a model that gives a text one number (``AutoModelForSequenceClassification``).
SCALAR_HEAD = "score.weight"

#: How the architectures of models end that give a text one number, and of those that write.
CLASSIFIER, WRITERS = "ForSequenceClassification", ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def as_classifier(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a config.json, as of the sequence classifier with one label that has the same layers."""
    named = []
    for architecture in hub.get("architectures") or [""]:  # where none is named, the ending alone says what it is
        for ending in WRITERS:
            architecture = architecture.removesuffix(ending)
        named.append(architecture.removesuffix(CLASSIFIER) + CLASSIFIER)
    return {**hub, "architectures": named, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def require_one_label(path: Path, hub: Mapping[str, Any], default: int = 1) -> None:
    """Refuses the contents ``hub`` of ``path``, a classifier's config.json, where it makes several numbers of a text.

    Args:
        default: how many it makes where the file does not say.

    Raises:
        ModelError: it does.
    """
    labels = len(hub.get("id2label") or ()) or hub.get("num_labels", default)
    if labels != 1:
        raise ModelError(
            f"{path} describes a model that sorts texts into {labels} kinds",
            hint="Accepted as rerankers, judges and reward models are: a classifier with one label, which makes one "
            "number of a text or a pair; an embedding model; and a decoder that answers yes or no "
            "(--rerank-template).",
        )


def views_on(decoder: Decoder, family: Family) -> dict[str, Tensor]:
    """The decoder's weights, without a tied head, by their names in folders of ``family``.

    The tensors are detached views of the parameters: reading them exports the decoder, copying into them imports one.
    """
    return {hub: part for _, hub, part in placed(decoder, family)}


def placed(decoder: Decoder, family: Family) -> Iterator[tuple[str, str, Tensor]]:
    """Of each weight the name of our parameter, its own name on disk, and the view of the parameter that it is."""
    for name, parameter in decoder.named_parameters():
        for hub, view in pieces(decoder.config, family, name, parameter.detach()):
            yield name, hub, view


def pieces(config: DecoderConfig, family: Family, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The views of one weight, ``tensor``, that has the ``name`` in a decoder, by their names on disk."""
    layer, stack = _layer(name), family.tensors[general(name)]
    if name == "head.weight" and config.scalar_head:
        stack = (SCALAR_HEAD,)
    matrices = tensor if "{expert}" in stack[0] else tensor.unsqueeze(0)
    for expert, matrix in enumerate(matrices):
        parts = matrix.split(_rows(config, name, len(matrix), len(stack)))
        for hub, part in zip(stack, parts, strict=True):
            yield hub.format(layer=layer, expert=expert), part.mT if general(name) in family.transposed else part


def general(name: str) -> str:
    """A parameter's name, with ``{layer}`` for the number of its layer."""
    layer = _layer(name)
    return name.replace(f".{layer}.", ".{layer}.", 1) if layer else name


def _layer(name: str) -> str:
    return next((part for part in name.split(".") if part.isdecimal()), "")


def _rows(config: DecoderConfig, name: str, rows: int, parts: int) -> list[int]:
    """How many of the ``rows`` of our parameter each of the tensors has that are stacked in it."""
    if ".qkv." in name and parts > 1:
        return [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return [rows // parts] * parts
