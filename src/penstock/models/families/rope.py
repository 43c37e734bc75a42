"""Rotary embedding in config.json: ``rope_theta`` with ``rope_scaling``, or transformers 5's ``rope_parameters``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.core.errors import ModelError
from penstock.models.config import RopeConfig
from penstock.models.families.contract import HubConfig

#: For each kind of scaling, our fields and their keys on disk.
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
    "longrope": {
        "short": "short_factor",
        "long": "long_factor",
        "original_context": "original_max_position_embeddings",
        "attention_factor": "attention_factor",
    },
}

#: What a kind of scaling was called before.
FORMERLY = {"su": "longrope"}


def rope_from_hub(hub: HubConfig) -> dict[str, Any]:
    """The fields of a :class:`RopeConfig`. Where old and new keys stand together the old win, as in transformers.

    Raises:
        ModelError: a scaling that the Decoder does not have, named.
    """
    found = dict(_table(hub, "rope_scaling") or _table(hub, "rope_parameters"))
    if any(isinstance(value, dict) for value in found.values()):
        raise ModelError("rotary embeddings that differ by layer type (nested rope_parameters) are not supported here")
    theta = found.get("rope_theta", hub["rope_theta"])
    fraction = found.get("partial_rotary_factor", hub.get("partial_rotary_factor"))
    kind = found.get("rope_type", found.get("type", "default"))
    kind = FORMERLY.get(str(kind), kind)
    fields = {"theta": theta, "fraction": 1.0 if fraction is None else fraction}
    if kind == "default":
        return fields
    if kind not in SCALINGS:
        raise ModelError(f"the RoPE scaling {kind!r} is not supported", hint=f"Supported: {', '.join(SCALINGS)}.")
    keys = SCALINGS[kind]
    if "original_context" in keys:
        key = keys["original_context"]
        found[key] = hub.get(key) or found.get(key) or hub["max_position_embeddings"]
        if found.get("factor") is None:
            found["factor"] = hub["max_position_embeddings"] / found[key]
        if kind == "longrope" and found.get("attention_factor") is None:
            found["attention_factor"] = _stretch(found["factor"], found[key])
    given = {ours: found[theirs] for ours, theirs in keys.items() if found.get(theirs) is not None}
    return {**fields, "scaling": {"kind": kind, **given}}


def turning_whole_heads(fields: dict[str, Any]) -> dict[str, Any]:
    """The ``fields`` of a :class:`RopeConfig`, in a family that turns no part of a head.

    Raises:
        ModelError: they are those of a part.
    """
    if fields["fraction"] != 1:
        raise ModelError("partial_rotary_factor is not supported: this family turns whole heads")
    return fields


def _table(hub: HubConfig, key: str) -> Mapping[str, Any]:
    """What is under ``key``, where anything is.

    Raises:
        ModelError: it is no table.
    """
    found = hub.get(key) or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"{key} is {found!r}, and no table of keys and values")
    return found


def _stretch(factor: float, original: int) -> float:
    """LongRoPE's factor on cosines and sines."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_to_hub(rope: RopeConfig) -> dict[str, Any]:
    """The classic pair of keys, which every reader of published checkpoints knows, and the part that is turned."""
    keys: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.fraction != 1:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not None:
        fields = rope.scaling.model_dump(exclude_none=True)
        kind = fields.pop("kind")
        keys["rope_scaling"] = {"rope_type": kind, **{SCALINGS[kind][ours]: value for ours, value in fields.items()}}
    return keys


def ropes_from_hub(hub: HubConfig, local: str | None = None) -> dict[str, Any]:
    """The fields ``rope`` and ``local_rope`` of families in which layers with a window have a rotation of their own:
    transformers 5's nested ``rope_parameters``, or the classic keys for the other layers and, for those with a window,
    ``local``, the key of their base, or the same base, unscaled."""
    nested = _table(hub, "rope_parameters")
    if "full_attention" in nested or "sliding_attention" in nested:
        parts = [dict(nested.get(name) or {}) for name in ("full_attention", "sliding_attention")]
        parts[0] |= _table(hub, "rope_scaling")
    else:
        scaling = _table(hub, "rope_scaling") or nested
        theta = scaling.get("rope_theta", hub["rope_theta"])
        parts = [dict(scaling), {"rope_theta": hub[local] if local else theta}]
    # Whether a correction of YaRN's is truncated transformers does not look up there.
    plain = [{key: value for key, value in part.items() if key != "truncate"} for part in parts]
    alone = [HubConfig({**hub, "rope_scaling": None, "rope_parameters": part}) for part in plain]
    rope, local_rope = (turning_whole_heads(rope_from_hub(each)) for each in alone)
    return {"rope": rope, "local_rope": local_rope}


def nested_to_hub(rope: RopeConfig) -> dict[str, Any]:
    """One of the two in a nested ``rope_parameters``."""
    keys = rope_to_hub(rope)
    return {"rope_type": "default", "rope_theta": rope.theta, **(keys["rope_scaling"] or {})}
