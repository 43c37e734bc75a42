"""A file of weights that is read piece by piece while a model runs, and must stay what it was."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.core.files import explain_os_errors


class LostWeightsError(ModelError):
    """Weights that a running model reads from disk are not there any more, or not the same."""


class WeightFile:
    """An open file, read at any place by any thread. It is read, and not mapped: a mapped file that is cut short ends
    the process that looks at it.

    Args:
        path: of the file.

    Raises:
        PenstockError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_os_errors(f"cannot read {path}"):
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._was = _identity(os.fstat(self._descriptor))

    def read(self, begin: int, into: Tensor) -> None:
        """Fills ``into``, contiguous, with the bytes from ``begin`` on.

        Raises:
            LostWeightsError: the file ends before, or cannot be read.
        """
        rest = into.view(-1).view(torch.uint8).numpy().data
        while rest:
            try:
                count = os.preadv(self._descriptor, [rest], begin)
            except OSError as error:
                raise self._lost(f"cannot be read any more ({error.strerror})") from error
            if not count:
                raise self._lost("has become shorter")
            rest, begin = rest[count:], begin + count

    def check(self) -> None:
        """Makes sure that what was read so far is what was there when the file was opened.

        Raises:
            LostWeightsError: the file has been changed, replaced or removed since.
        """
        try:
            now = _identity(self.path.stat())
        except OSError as error:
            raise self._lost(f"is gone ({error.strerror})") from error
        if now != self._was:
            raise self._lost("has changed")

    def _lost(self, what: str) -> LostWeightsError:
        return LostWeightsError(
            f"{self.path} {what} while a model read its layers from it",
            hint="Bring the file back and start again, or copy the model to where nobody changes it.",
        )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What stays the same while nobody touches a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
