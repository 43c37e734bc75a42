"""Heads as folders: ``head.json`` says which head it is and names its target, ``head.safetensors`` has the weights.

Beside the weights lie those of the target's last norm. They tell whether the model that is to be drafted for is the one
that the head was trained for, also where that is stored in another dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from penstock.core.errors import ModelError, UsageError
from penstock.core.files import read_json, write_json
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Head, HeadModule
from penstock.models.heads.headed import Headed
from penstock.models.heads.weights import (
    AGAIN,
    called,
    fill,
    folder_with,
    marks,
    read_weights,
    same_marks,
    sizes_of,
    write_weights,
)
from penstock.policy import Choice, index

DESCRIPTION, WEIGHTS = "head.json", "head.safetensors"
TARGET = "target"


class Description(NamedTuple):
    """What ``head.json`` says: which head, of which model, and that model's sizes."""

    kind: Head
    target: str
    sizes: dict[str, int]


def command(kind: str = "early-exit", target: str = "MODEL") -> str:
    """What to type to train a head."""
    return f"penstock train --preset drafter-{kind.replace('_', '-')} --set target={target} --out runs/drafter"


def find(source: str | Path) -> Path | None:
    """The folder of a head; see :func:`~penstock.models.heads.weights.folder_with`."""
    return folder_with(DESCRIPTION, source)


def drafter_of(source: str | Path) -> str:
    """The policy of ``speculate.drafter`` that drafts with the head ``source`` (see :func:`find`), which is there.

    Raises:
        PenstockError: its description is damaged.
    """
    folder = find(source)
    assert folder is not None
    return describe(folder).kind.drafter


def save(model: Headed, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the head of ``model`` into a folder that exists.

    Raises:
        PenstockError: the disk is full, or the folder cannot be written.
    """
    write_weights(folder / WEIGHTS, {**model.head.state_dict(), **marks(TARGET, model.target)}, dtype)
    said = {"head": model.kind.describe(), "target": called(model.source), "sizes": sizes_of(model.target)}
    write_json(folder / DESCRIPTION, said)


def describe(folder: Path) -> Description:
    """What a head's folder says of it.

    Raises:
        PenstockError: the description is missing or damaged.
    """
    path = folder / DESCRIPTION
    stored = read_json(path)
    try:
        kind = Choice("model.head").resolve(stored["head"])
        return Description(kind, str(stored["target"]), {key: int(size) for key, size in stored["sizes"].items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{path} does not describe a head by the keys head, target and sizes"
        raise ModelError(what, hint=AGAIN) from error


def load(source: str | Path, target: Decoder, name: str = "MODEL") -> HeadModule:
    """The head ``source`` (see :func:`find`), on the device and in the dtype of its ``target``, which is called
    ``name``.

    Raises:
        UsageError: there is no head, or it is for another model; the hint is the command that trains one.
        ModelError: the folder is damaged.
    """
    folder = find(source)
    if folder is None:
        known = ", ".join(index().names("model.head"))
        raise UsageError(
            f"there is no head in {str(source)!r}: it has neither {DESCRIPTION} nor model/{DESCRIPTION}",
            hint=f"Train one ({known}): {command(target=name)}",
        )
    kind, trained_for, sizes = describe(folder)
    again = f"Train one for this model: {command(kind.policy_name, name)}"
    differing = {key: (size, sizes.get(key)) for key, size in sizes_of(target).items() if size != sizes.get(key)}
    if differing:
        said = ", ".join(f"{key} is {here}, and was {there}" for key, (here, there) in differing.items())
        raise UsageError(f"the head in {folder} was trained for {trained_for}, not for this model: {said}", hint=again)
    head = kind.build(target.config)
    tensors = read_weights(folder / WEIGHTS)
    if not same_marks(TARGET, target, tensors):
        raise UsageError(
            f"the head in {folder} was trained for {trained_for}, and this model's weights are others", hint=again
        )
    fill(head, tensors, folder)
    weight = target.like
    return head.to(weight.device, weight.dtype).requires_grad_(False).eval()


def import_state(model: Headed, folder: Path) -> None:
    """Copies the weights in ``folder`` into the head of ``model``, in place.

    Raises:
        ModelError: the folder is damaged, or of another head.
    """
    fill(model.head, read_weights(folder / WEIGHTS), folder)
