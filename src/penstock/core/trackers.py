"""Where the metrics of a run are shown besides its own file: TensorBoard where it is installed, W&B where asked for."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from penstock.core.errors import UsageError
from penstock.core.files import explain_os_errors, write_atomic


class Tracker(Protocol):
    """A place that metrics are sent to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends ``values`` of ``step``."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class TensorBoard:
    """Event files in ``folder/tensorboard``. What an earlier process wrote of the steps to come is not shown."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with explain_os_errors("cannot write for TensorBoard"):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        with explain_os_errors("cannot write for TensorBoard"):
            self._board.close()


class WeightsAndBiases:
    """A run of the W&B project ``project``, named after the folder; a run that goes on is the same one there.

    Raises:
        UsageError: the library is not installed, or refuses to begin.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                "the option wandb needs the library of that name", hint="Install it: pip install 'penstock[wandb]'"
            ) from error
        path = folder / "wandb-id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(8))
        options = {"project": project, "name": folder.name, "dir": str(folder), "config": dict(config)}
        try:
            self._run = wandb.init(**options, id=path.read_text().strip(), resume="allow")
        except Exception as error:  # the library and the network raise what they like
            raise UsageError(
                f"W&B did not begin: {error}", hint="Log in with 'wandb login', or unset wandb."
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # a service that fails must not end a run, whose metrics are in its own file
            warnings.warn(f"W&B did not take step {step}: {error}", stacklevel=2)

    def close(self) -> None:
        self._run.finish()


def tensorboard(folder: Path, step: int) -> list[Tracker]:
    """TensorBoard, if it is installed."""
    try:
        return [TensorBoard(folder, step)]
    except ImportError:
        return []
