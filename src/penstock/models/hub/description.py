"""What a folder's config.json says: the family, and the shape of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from penstock.core.errors import ModelError, UsageError
from penstock.core.files import read_json
from penstock.models.config import DecoderConfig
from penstock.models.families.contract import Family
from penstock.models.families.mapping import CLASSIFIER, require_one_label
from penstock.models.families.nearest import nearest_family
from penstock.models.hub.family import CONTRACT, family_named
from penstock.models.hub.folders import CONFIG
from penstock.models.hub.multimodal import text_part
from penstock.models.hub.stored import stored_in
from penstock.policy import index


class Description(NamedTuple):
    """A folder, the family and the shape of the model in it, and the contents of its config.json."""

    folder: Path
    family: Family
    config: DecoderConfig
    raw: dict[str, Any]


def read_config(folder: Path) -> DecoderConfig:
    """The shape of the model in ``folder``.

    Raises:
        UsageError: there is no config.json.
        ModelError: it is of an unknown family, is quantized, or asks for what the Decoder does not do.
    """
    return describe(folder).config


def describe(folder: Path) -> Description:
    """What the config.json of ``folder`` says.

    Raises:
        UsageError, ModelError: as :func:`read_config`.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint="Name a Hugging Face folder.")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a table of keys and values")
    text = text_part(raw)
    kind, families = text.get("model_type"), index().names(CONTRACT)
    if kind not in families:
        raise ModelError(f"{path}: the model_type {kind!r} is not supported", hint=_alternatives(folder, raw))
    family = family_named(kind)
    if _classifies(text):
        require_one_label(path, text)
    try:
        config = family.config_from_hub(text)
        return Description(folder, family, config.model_copy(update={"scalar_head": _classifies(text)}), raw)
    except ModelError as error:
        raise ModelError(f"{path}: {error.what}", hint=error.hint) from error


def _classifies(raw: dict[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classifier."""
    named = raw.get("architectures")
    return isinstance(named, list) and any(str(name).endswith(CLASSIFIER) for name in named)


def _alternatives(folder: Path, raw: dict[str, Any]) -> str:
    """What a folder of an unknown family might be read as."""
    if index().find("model.encoder", str(raw.get("model_type"))) is not None:
        return (
            "It is an encoder, which writes no text: open_embedder of penstock.serve.embed.embedder opens it, and "
            "penstock serve makes its vectors over HTTP."
        )
    families = [family_named(name) for name in index().names(CONTRACT)]
    known = f"Families: {', '.join(each.policy_name for each in families)}."
    try:
        shapes = {name: stored.shape for name, stored in stored_in(folder, raw).headers.items()}
    except ModelError:
        return known
    found = nearest_family(families, raw, shapes)
    if found is None:
        return known
    name, differing = found
    if not differing:
        return f"Its weights are those of {name!r}: if it computes the same, set model_type to {name!r} in {CONFIG}."
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"The nearest family is {name!r}, but for {', '.join(differing[:3])}{more}. {known}"
