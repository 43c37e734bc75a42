"""Weights that are trained beside models that stay as they are, on disk.

Beside them lie those of the models' last norms, their *marks*. They tell whether the models at hand are those that the
weights were trained beside, also where these are stored in another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from penstock.core.errors import ModelError, PenstockError
from penstock.models.decoder import Decoder

#: How much a norm may differ from what it was, relative to it: as bf16 rounds.
ROUNDED = 2**-7

#: What to do about a folder that is damaged.
AGAIN = "Copy the folder again from where it was trained, or train it anew."

#: What the marks of a model begin with, by its part.
MARKS = {"target": "target.norm.", "draft": "draft.norm."}


def folder_with(description: str, source: str | Path) -> Path | None:
    """The folder with a file ``description``: ``source`` itself, or that of a run that trained the weights (its
    ``model/``, else the newest of its ``checkpoints/``); None if it is none of these."""
    folder = Path(source)
    newest_first = sorted(folder.glob("checkpoints/step-*"), reverse=True)
    return next((each for each in (folder, folder / "model", *newest_first) if (each / description).is_file()), None)


def write_weights(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes ``tensors`` by name, in ``dtype`` if it is given.

    Raises:
        PenstockError: the disk is full, or the folder cannot be written.
    """
    named = {name: each.detach().to("cpu", dtype or each.dtype).contiguous() for name, each in tensors.items()}
    try:
        save_file(named, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise PenstockError(f"cannot write {path}: {error}", hint="Is the disk full?") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """What :func:`write_weights` wrote.

    Raises:
        ModelError: the file is missing, or damaged.
    """
    if not path.exists():
        raise ModelError(f"{path.parent} has no weights: {path.name} is missing", hint=AGAIN)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights {path} cannot be read: {error}", hint=AGAIN) from error
    return tensors


def fill(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies ``tensors`` from ``folder``, but for the marks among them, into ``module``.

    Raises:
        ModelError: they are those of another one.
    """
    marked = tuple(MARKS.values())
    given = {name: each for name, each in tensors.items() if not name.startswith(marked)}
    own = module.state_dict()
    differing = {
        "missing": [name for name in own if name not in given],
        "unknown": [name for name in given if name not in own],
        "of another shape": [name for name in own if name in given and given[name].shape != own[name].shape],
    }
    said = [f"{len(names)} {how}, such as {names[0]}" for how, names in differing.items() if names]
    if said:
        raise ModelError(f"the weights in {folder} are not those of its head: {'; '.join(said)}", hint=AGAIN)
    module.load_state_dict(given)


def marks(part: str, model: Decoder) -> dict[str, Tensor]:
    """The marks of ``model``, which has this ``part`` of :data:`MARKS`."""
    return {MARKS[part] + name: each for name, each in model.norm.state_dict().items()}


def same_marks(part: str, model: Decoder, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the marks among ``tensors`` are those of ``model``."""
    for name, now in marks(part, model).items():
        then = tensors.get(name)
        if then is None or not torch.allclose(then.float(), now.float().cpu(), rtol=ROUNDED, atol=ROUNDED):
            return False
    return True


def sizes_of(model: Decoder) -> dict[str, int]:
    """The sizes of ``model`` by which its heads are told from others'."""
    shape = model.config
    return {"hidden": shape.hidden, "layers": shape.layers, "vocabulary": shape.vocabulary}


def called(source: str) -> str:
    """What a model ``source`` is called wherever it is read: of a folder, its whole path."""
    return str(Path(source).resolve()) if Path(source).exists() else source
