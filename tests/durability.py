"""Whether what is renamed into place survives a loss of power."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

#: A file or a folder whatever it is called, and how long it was then.
State = tuple[int, int]


def _state(path: Path) -> State:
    status = path.stat()
    return status.st_ino, status.st_size if path.is_file() else 0


@contextlib.contextmanager
def durable() -> Iterator[list[Path]]:
    """Asserts that, within the block, everything is synced as it is before it is renamed, a folder with all that is in
    it, and that the folder around it is synced after that. What gives way, to a name that ends in ``.old``, was there
    before, and is let alone.

    Yields the list of what has been put in place.
    """
    synced: set[State] = set()
    waiting: dict[int, Path] = {}  # of folders in which something was renamed: who waits for it to be synced
    placed: list[Path] = []
    real_sync = os.fsync

    def fsync(descriptor: int) -> None:
        real_sync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else 0))
        waiting.pop(status.st_ino, None)

    def renaming(real):
        def rename(source, target, **options):
            source, target = Path(source), Path(target)
            if target.suffix != ".old":
                for part in (source, *source.rglob("*")) if source.is_dir() else (source,):
                    assert _state(part) in synced, f"{part} is renamed to {target} and was not synced"
                waiting[target.parent.stat().st_ino] = target
                placed.append(target)
            return real(source, target, **options)

        return rename

    with (
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(os, "rename", renaming(os.rename)),
        mock.patch.object(os, "replace", renaming(os.replace)),
    ):
        yield placed
    assert placed, "nothing was renamed"
    assert not waiting, f"the folder of {sorted(map(str, waiting.values()))} was not synced afterwards"
