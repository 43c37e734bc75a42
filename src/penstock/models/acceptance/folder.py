"""Acceptance heads as folders: ``acceptance.json`` names the two models, ``acceptance.safetensors`` has the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from penstock.core.errors import ModelError, UsageError
from penstock.core.files import read_json, write_json
from penstock.models.acceptance.head import AcceptanceHead, Pair, like
from penstock.models.decoder import Decoder
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

DESCRIPTION, WEIGHTS = "acceptance.json", "acceptance.safetensors"

#: What a head is called that lies in the folder of the model that drafts.
BESIDE = "acceptance"


def command(draft: str = "DRAFT", target: str = "MODEL") -> str:
    """What to type to train a head."""
    return f"penstock train --preset acceptance --set target={target} --set draft={draft} --out runs/acceptance"


def find(source: str | Path) -> Path | None:
    """The folder of a head; see :func:`~penstock.models.heads.weights.folder_with`."""
    return folder_with(DESCRIPTION, source)


def save(pair: Pair, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the head of ``pair`` into a folder that exists.

    Raises:
        PenstockError: the disk is full, or the folder cannot be written.
    """
    models = {"draft": pair.draft, "target": pair.target}
    marked = {name: each for part, model in models.items() for name, each in marks(part, model).items()}
    write_weights(folder / WEIGHTS, {**pair.head.state_dict(), **marked}, dtype)
    said = {part: called(name) for part, name in zip(models, pair.names, strict=True)}
    write_json(folder / DESCRIPTION, {**said, "sizes": {part: sizes_of(model) for part, model in models.items()}})


def load(source: str | Path, draft: Decoder, target: Decoder, names: tuple[str, str]) -> AcceptanceHead:
    """The head in ``source``, on the device and in the dtype of ``draft``, for what that drafts for ``target``; these
    are called ``names``. Where it is looked for, :func:`find` says.

    Raises:
        UsageError: there is no head, or it is for other models; the hint is the command that trains one.
        ModelError: the folder is damaged.
    """
    folder = find(source)
    again = f"Train one: {command(*names)}, and name it: --set controller.head=runs/acceptance"
    if folder is None:
        raise UsageError(
            f"there is no acceptance head in {str(source)!r}: it has neither {DESCRIPTION} nor model/{DESCRIPTION}",
            hint=again,
        )
    tensors, said = read_weights(folder / WEIGHTS), read_json(folder / DESCRIPTION)
    for part, model in (("draft", draft), ("target", target)):
        try:
            same, trained_for = said["sizes"][part] == sizes_of(model), said[part]
        except (KeyError, TypeError) as error:
            what = f"{folder / DESCRIPTION} does not describe an acceptance head by its sizes, target and draft"
            raise ModelError(what, hint=AGAIN) from error
        if not same or not same_marks(part, model, tensors):
            raise UsageError(
                f"the acceptance head in {folder} was trained for the {part} {trained_for}, which this one is not",
                hint=again,
            )
    head, weight = like(draft), draft.like
    fill(head, tensors, folder)
    return head.to(weight.device, weight.dtype).requires_grad_(False).eval()


def import_state(pair: Pair, folder: Path) -> None:
    """Copies the weights in ``folder`` into the head of ``pair``, in place.

    Raises:
        ModelError: the folder is damaged, or of another head.
    """
    fill(pair.head, read_weights(folder / WEIGHTS), folder)
