"""The families of models: by name, the one that a decoder comes from, and the one that it is saved in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from penstock.core.errors import ModelError
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.hub.multimodal import text_part
from penstock.models.shares import portion_of
from penstock.policy import create, index

if TYPE_CHECKING:
    from penstock.models.hub.description import Description

CONTRACT = "model.family"

#: Keys of config.json that a Decoder has no use for, but which it keeps from load to save.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Origin(NamedTuple):
    """What a loaded decoder remembers of its folder, so that saving it writes the like."""

    family: str
    token_ids: dict[str, Any]


def family_named(name: str) -> Family:
    """The family that a ``model_type`` names.

    Raises:
        UsageError: there is none.
    """
    return cast(Family, create(CONTRACT, name))


def family_of(decoder: Decoder, family: str | None = None) -> Family:
    """The family that a decoder is saved in: the one asked for, or, of those that can express it, the one that it was
    loaded from, or else the one with the highest rank.

    Raises:
        UsageError: there is no family of that name.
        ModelError: it cannot be expressed; the message says what is lost, by the families that lose least.
    """
    families = [family_named(name) for name in ([family] if family else index().names(CONTRACT))]
    origin = origin_of(decoder)
    families.sort(key=lambda each: (origin is not None and each.policy_name == origin.family, each.rank), reverse=True)
    # Of each family there are reward models.
    portion = portion_of(decoder)
    whole = decoder.config if portion is None else portion.whole
    plain = whole.model_copy(update={"scalar_head": False})
    losses = {each.policy_name: each.losses(plain) for each in families}
    for each in families:
        if not losses[each.policy_name]:
            return each
    nearest_ones = sorted(losses.items(), key=lambda item: len(item[1]))[:3]
    raise ModelError(
        "no Hugging Face folder can express this model; what stands in the way: "
        + "; ".join(f"as {name}, {', '.join(lost)}" for name, lost in nearest_ones)
    )


def remember(decoder: Decoder, described: Description) -> None:
    """Notes the origin of a decoder."""
    text = text_part(described.raw)
    token_ids = {key: text[key] for key in TOKEN_IDS if key in text}
    # Kept on the instance and not declared by Decoder, which knows nothing of folders.
    vars(decoder)["origin"] = Origin(described.family.policy_name, token_ids)


def origin_of(decoder: Decoder) -> Origin | None:
    """Where a decoder comes from, unless it was made anew."""
    return cast("Origin | None", vars(decoder).get("origin"))
