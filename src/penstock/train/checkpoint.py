"""Checkpoints: a Hugging Face folder with the trainer's state beside it.

``checkpoints/step-00000400/`` holds ``config.json``, ``model.safetensors`` and the tokenizer, so it is a model like any
other; ``trainer/`` in it holds the optimizer's state and ``state.json``, and ``manifest.json`` the length and BLAKE2b
of every file. A checkpoint appears under its name only when it is whole and on disk (:func:`atomic_folder`), so a
killed process leaves either all of it or nothing; damage done later is found by the manifest.

Where processes have the model in shards, each writes some of the weights and of the state, every tensor whole, into a
file of its own, such as ``optimizer-00002-of-00004.safetensors``. So a checkpoint is the same whoever wrote it, and any
number of processes goes on with it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.core.errors import CheckpointError, PenstockError, UsageError
from penstock.core.files import atomic_folder, explain_os_errors, read_json, write_json
from penstock.models.companions import copy_companions
from penstock.parallel.shard import like
from penstock.parallel.shared_folder import Entry, entry
from penstock.train import folders
from penstock.train.folders import Exported

SCHEMA = 1
MANIFEST, TRAINER = "manifest.json", "trainer"
_NAME = re.compile(r"step-\d{8,}")


@dataclasses.dataclass
class TrainerState:
    """All that a resumed run needs besides the model.

    Attributes:
        position: plain numbers: step, samples, tokens, seconds.
        description: the configuration and the code's version, for people, and for who resumes to compare.
        tensors: by group (``optimizer``, ``average``, ``masters``), by name.
    """

    position: dict[str, Any]
    description: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


class Stored(Mapping[str, Tensor]):
    """The tensors of some safetensors files, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        opened = [safetensors.safe_open(path, framework="pt") for path in files]
        self._files: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay: the newest ``newest``, those of steps that ``every`` divides, and that of ``best``."""

    newest: int
    every: int | None = None
    best: int | None = None

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Those of ``steps``, in ascending order, that stay."""
        return {
            *steps[-self.newest :],
            *(step for step in steps if (self.every and step % self.every == 0) or step == self.best),
        }


def save(folder: Path, step: int, model: Exported, tokenizer: Path, state: TrainerState, *, keeping: Keeping) -> Path:
    """Writes the checkpoint of ``step`` below ``folder`` and removes those up to it that need not be kept.

    One of the same step is replaced, and those of later steps are removed: only damaged ones are there, which a resumed
    run has passed over.

    Args:
        folder: the run's folder of checkpoints.
        step: updates done.
        model: saved in its own dtype.
        tokenizer: a folder with the tokenizer and what else lies beside the weights, copied along.
        state: the trainer's.
        keeping: which checkpoints stay.

    Raises:
        PenstockError: the disk is full or not writable; older checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    with atomic_folder(target) as temporary:
        folders.save(model, temporary)
        copy_companions(tokenizer, temporary)
        for group, tensors in state.tensors.items():
            write_tensors(temporary / TRAINER / f"{group}.safetensors", tensors)
        complete(temporary, state, {})
    prune(folder, step, keeping)
    return target


def complete(folder: Path, state: TrainerState, entries: Mapping[str, Entry]) -> None:
    """Writes what says what the others are into a checkpoint's ``folder``, where all other files are.

    Args:
        folder: not under its name yet.
        state: the tensors in it are not written here.
        entries: of the manifest, as far as they are known.
    """
    write_json(
        folder / TRAINER / "state.json",
        {"schema": SCHEMA, "position": state.position, **state.description, "groups": sorted(state.tensors)},
    )
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / MANIFEST, {name: entries.get(name) or entry(path) for name, path in files.items()})


def prune(folder: Path, step: int, keeping: Keeping) -> None:
    """Removes the checkpoints below ``folder`` that need not be kept beside that of ``step``."""
    kept = keeping.kept([found for found in map(step_of, checkpoints(folder)) if found <= step])
    for path in checkpoints(folder):
        if step_of(path) not in kept:
            with explain_os_errors(f"cannot remove {path}"):
                shutil.rmtree(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors into a file of the folder that holds the trainer's state."""
    path.parent.mkdir(exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, path)
    except safetensors.SafetensorError as error:
        raise PenstockError(f"cannot write {path}: {error}", hint="Is the disk full?") from error


def copy(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint, which is verified first, below another ``folder`` of checkpoints.

    Raises:
        UsageError: there is no checkpoint.
        CheckpointError: it is damaged.
    """
    if _NAME.fullmatch(checkpoint.name) is None or not checkpoint.is_dir():
        raise UsageError(
            f"{checkpoint} is not a checkpoint", hint="Name a folder such as RUN/checkpoints/step-00000400."
        )
    verify(checkpoint)
    target = folder / checkpoint.name
    with atomic_folder(target) as temporary:
        shutil.copytree(checkpoint, temporary, dirs_exist_ok=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first, damaged ones among them."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The updates done when ``checkpoint`` was written, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def verify(checkpoint: Path) -> None:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the first file that is missing or differs, named.
    """
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except PenstockError as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error.what}") from error
    if not isinstance(manifest, dict) or not manifest:
        raise CheckpointError(f"{checkpoint} is damaged: its {MANIFEST} lists no files")
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} is damaged: {name} is missing")
        try:
            found = entry(path)
        except OSError as error:
            raise CheckpointError(f"{checkpoint} cannot be read: {name}: {error.strerror}") from error
        if found != expected:
            raise CheckpointError(f"{checkpoint} is damaged: {name} is not what was written")


def newest(folder: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest whole checkpoint below ``folder`` (None: there is none yet), and what is wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    faults: list[CheckpointError] = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as fault:
            faults.append(fault)
        else:
            return checkpoint, faults
    if not faults:
        return None, []
    raise CheckpointError(
        f"there is no whole checkpoint in {folder}:" + "".join(f"\n  {fault.what}" for fault in faults),
        hint="Restore one from a copy, or train again in another folder.",
    )


def load_state(checkpoint: Path) -> TrainerState:
    """The trainer's state of a verified checkpoint."""
    stored = read_json(checkpoint / TRAINER / "state.json")
    if stored.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{checkpoint} has the schema {stored.get('schema')!r}, and this version of Penstock reads {SCHEMA}"
        )
    trainer = checkpoint / TRAINER
    tensors = {
        group: Stored([*trainer.glob(f"{group}.safetensors"), *trainer.glob(f"{group}-*-of-*.safetensors")])
        for group in stored["groups"]
    }
    description = {k: v for k, v in stored.items() if k not in ("schema", "position", "groups")}
    return TrainerState(stored["position"], description, tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's state as ``{parameter/key: tensor}``; ``names`` gives the parameter's name by its id."""
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> None:
    """Puts the state of :func:`optimizer_tensors` back, on each parameter's device (scalars as the kernel wants them).

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the checkpoint has optimizer state of {name!r}, which this model does not have")
        if value.dim() and value.shape != parameter.shape:
            raise CheckpointError(f"the checkpoint's optimizer state of {name!r} is {tuple(value.shape)}")
        optimizer.state[parameter][key] = like(parameter, value)
