"""Which family is nearest to a folder of a type that is none of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from penstock.core.errors import ModelError
from penstock.models.blank import without_weights
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import views_on

#: So many layers are compared.
LAYERS = 4


def nearest_family(
    families: Iterable[Family], hub: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, list[str]] | None:
    """The family whose model of the same config.json has the most nearly the same tensors, by names and ``shapes``.

    Returns:
        Its name, and the tensors that one has and the other has not, or in another shape; None where no family can read
        ``hub``, or none has half of the tensors.
    """
    there = {name: shape for name, shape in shapes.items() if _layer(name) < LAYERS}
    found: list[tuple[int, int, str, list[str]]] = []
    for family in families:
        try:
            config = family.config_from_hub({**hub, "num_hidden_layers": min(LAYERS, hub.get("num_hidden_layers", 0))})
        except ModelError:
            continue
        with without_weights():
            ours = {name: tuple(view.shape) for name, view in views_on(Decoder(config), family).items()}
        theirs = {weight: there[name] for name in there if (weight := family.weight(name, config)) is not None}
        if config.tied:  # a head that is the embedding again may be stored or not
            theirs.pop(family.tensors["head.weight"][0], None)
        differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
        found.append((len(differing), -family.rank, family.policy_name, differing))
    best = min(found, default=None)
    return None if best is None or 2 * best[0] > len(there) else (best[2], best[3])


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to; 0 for those of none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else 0
