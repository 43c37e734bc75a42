"""A folder that all processes write files into, and that appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from penstock.core.files import appear, checksum, explain_os_errors, fsync_file, read_json, write_json
from penstock.parallel.world import World

#: Seconds between two looks at whether the others are done.
PAUSE = 0.02

#: What the manifest of a folder says of a file: its length and its BLAKE2b.
Entry = dict[str, Any]


def entry(path: Path) -> Entry:
    """What a manifest says about a file."""
    return {"bytes": path.stat().st_size, "blake2b": checksum(path)}


class SharedFolder:
    """``target`` as it comes to be. All processes make it at the same time, on a file system that they have in common.

    To make it is an exchange of all; to write is none, and may go on beside the exchanges of others.
    """

    def __init__(self, target: Path, world: World) -> None:
        self._target, self._world = target, world
        token = int(world.largest(float(secrets.randbits(32)) if world.leads else 0.0)[0])
        self._partial = target.parent / f".{target.name}.{token:08x}.partial"

    def write(
        self, own: Callable[[Path], Iterable[Path]], last: Callable[[Path, dict[str, Entry]], None] = lambda *_: None
    ) -> None:
        """Writes this process's files. The leading process waits for those of the others, and then gives the folder its
        name.

        Args:
            own: writes into a folder that exists, and tells the files.
            last: what the leading process writes when all others are done; it is told what a manifest says of all files
                that are there, by their names.

        Raises:
            PenstockError: the disk is full, or the folder cannot be written.
            LossError: another process was lost. The folder does not appear.
        """
        try:
            with explain_os_errors(f"cannot write {self._target}"):
                self._partial.mkdir(parents=True, exist_ok=True)
                files = list(own(self._partial))
                for file in files:
                    fsync_file(file)
                told = {file.relative_to(self._partial).as_posix(): entry(file) for file in files}
                write_json(self._told(self._world.rank), told)
                if self._world.leads:
                    last(self._partial, self._all_told())
                    appear(self._partial, self._target)
        finally:
            if self._world.leads:
                shutil.rmtree(self._partial, ignore_errors=True)

    def _told(self, rank: int) -> Path:
        return self._partial / f".written-{rank}.json"

    def _all_told(self) -> dict[str, Entry]:
        """What all processes say of their files; waits for it."""
        every: dict[str, Entry] = {}
        for rank in range(self._world.size):
            while not self._told(rank).is_file():
                self._world.require_all()
                time.sleep(PAUSE)
            every |= read_json(self._told(rank))
            self._told(rank).unlink()
        return every
