"""What a run trains, on disk: a whole model, the head of one, or that of a pair."""

from __future__ import annotations

from pathlib import Path

import torch

from penstock.models import hub
from penstock.models.acceptance import folder as acceptance
from penstock.models.acceptance.head import Pair
from penstock.models.adapters.peft import Adapter
from penstock.models.decoder import Decoder
from penstock.models.heads import folder as heads
from penstock.models.heads.headed import Headed

#: What a run trains.
Trained = Decoder | Headed | Pair

#: What its folders hold: an adapter that is not merged lies there without its base.
Exported = Trained | Adapter


def check(model: Trained) -> None:
    """Refuses a shape that no folder could hold before the work, not after it.

    Raises:
        ModelError: it is such a shape.
    """
    if isinstance(model, Decoder):
        hub.family_of(model)


def save(model: Exported, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a model, a head or an adapter into a folder that exists; ``dtype`` is that of a model or head.

    Raises:
        PenstockError: the disk is full, or the folder cannot be written.
    """
    if isinstance(model, Adapter):
        model.write(folder)
    elif isinstance(model, Headed):
        heads.save(model, folder, dtype)
    elif isinstance(model, Pair):
        acceptance.save(model, folder, dtype)
    else:
        hub.save(model, folder, dtype=dtype)


def import_state(model: Trained, folder: Path) -> None:
    """Copies the weights in ``folder`` into ``model``, in place.

    Raises:
        ModelError: the folder is damaged, or of another model.
    """
    if isinstance(model, Headed):
        heads.import_state(model, folder)
    elif isinstance(model, Pair):
        acceptance.import_state(model, folder)
    else:
        hub.import_state(model, folder)
