"""Blocks of the cache in a folder, each a file that says itself whether it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock.core.errors import UsageError
from penstock.models.quantized import packed_layers

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder

log = logging.getLogger(__name__)

#: Of a file: the format, the block's name, the length of its content, and the checksum of both.
_HEADER = struct.Struct("<16s16sQI")
_FORMAT = b"penstock kv 2".ljust(16, b"\0")

#: Seconds after which an unfinished file is nobody's any more.
_STALE = 60.0

#: Numbers of each tensor that tell models apart.
_SAMPLED = 4096


def fingerprint(model: Decoder, *more: object) -> str:
    """Tells apart whose keys and values are not each other's: by the model's configuration, some of its weights'
    numbers (4,096 of each tensor, at equal distances, also of those that quantized matrices are stored in), their
    dtype, the format of the files, and by ``more``, which is printed."""
    digest = hashlib.blake2b(model.config.model_dump_json().encode(), digest_size=16)
    digest.update(_FORMAT + repr(more).encode())
    packed = (layer.named_buffers(name) for name, layer in packed_layers(model))
    for name, tensor in itertools.chain(model.state_dict().items(), *packed):
        some = tensor.detach().flatten()
        some = some[:: max(1, len(some) // _SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class DiskBlocks:
    """Blocks by name, of one model among others' in ``folder``. Those that were used last stay, whatever model they are
    of. Any thread may read and write.

    Who reads sees whole files or none, and what a crash or the disk did to one is noticed when it is read: then it is
    removed, and the block is not there. Once something cannot be written, nothing more is.

    Args:
        folder: is made where there is none; may be used by several engines, each of which keeps to its own budget.
        space: whose keys and values these are, see :func:`fingerprint`.
        budget: most bytes of all files.

    Raises:
        UsageError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, space: str, budget: int) -> None:
        self._folder, self._space, self._budget = folder, space, budget
        self._lock, self._open = threading.Lock(), True
        self._sizes: OrderedDict[str, int] = OrderedDict()
        try:
            (folder / space).mkdir(parents=True, exist_ok=True)
            found = []
            for path in folder.glob("*/*/*"):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    if path.suffix == ".kv":
                        found.append((state.st_mtime_ns, str(path.relative_to(folder)), state.st_size))
                    elif path.suffix == ".partial" and time.time() - state.st_mtime > _STALE:
                        path.unlink()
        except OSError as error:
            raise UsageError(
                f"the folder {folder} cannot hold blocks of the cache: {error.strerror}",
                hint="Name one that can be written to with --kv-disk.",
            ) from error
        self._sizes.update((path, size) for _, path, size in sorted(found))
        self.bytes = sum(self._sizes.values())

    def enter(self, space: str) -> None:
        """From now on the blocks are those of another ``space``."""
        with contextlib.suppress(OSError):  # which is noticed when one is written
            (self._folder / space).mkdir(exist_ok=True)
        self._space = space

    def __contains__(self, name: bytes) -> bool:
        return self._path(name) in self._sizes

    def read(self, name: bytes, into: memoryview) -> bool:
        """Fills ``into`` with the content of the block ``name``; False where that is not there, or not whole."""
        path = self._folder / self._path(name)
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
                whole = file.readinto(into) == len(into) and not file.read(1)
            if whole and header == _header(name, into):
                with contextlib.suppress(OSError):
                    os.utime(path)
                with self._lock:
                    if self._path(name) in self._sizes:
                        self._sizes.move_to_end(self._path(name))
                return True
            log.warning("the block %s is torn or has flipped bits: it is removed, and computed again", path)
        except FileNotFoundError:
            pass  # another engine's budget
        except OSError as error:
            log.warning("the block %s cannot be read, and is computed again: %s", path, error.strerror)
        self._remove(self._path(name))
        return False

    def write(self, name: bytes, content: memoryview) -> None:
        """Puts the block ``name`` into the folder, in place of those that were not used for the longest time."""
        path = self._folder / self._path(name)
        size = _HEADER.size + len(content)
        if not self._open or size > self._budget:
            return
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            while (oldest := self._surplus(size)) is not None:
                self._remove(oldest)
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(_header(name, content))
                file.write(content)
            # Nothing is synced: what a loss of power leaves under the name is torn, empty or gone, which the header
            # tells, and the block is computed again. To wait for the disk for each block would cost more than that.
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            with self._lock:
                first, self._open = self._open, False
            if first:
                log.warning(
                    "blocks of the cache cannot be written to %s any more: %s; what is there is still read",
                    self._folder,
                    error.strerror,
                )
            return
        with self._lock:
            self.bytes += size - self._sizes.pop(self._path(name), 0)
            self._sizes[self._path(name)] = size

    def _surplus(self, size: int) -> str | None:
        """What has to go before so many bytes more may be written."""
        with self._lock:
            return next(iter(self._sizes), None) if self.bytes + size > self._budget else None

    def _remove(self, path: str) -> None:
        with self._lock:
            self.bytes -= self._sizes.pop(path, 0)
        with contextlib.suppress(OSError):
            (self._folder / path).unlink()

    def _path(self, name: bytes) -> str:
        written = name.hex()
        return f"{self._space}/{written[:2]}/{written}.kv"


def _header(name: bytes, content: memoryview) -> bytes:
    # A CRC finds what a crash and a disk do, every flipped bit among it, at several times the speed of a cryptographic
    # hash, which was most of what it took to read a block that the system still had in memory.
    return _HEADER.pack(_FORMAT, name, len(content), zlib.crc32(content, zlib.crc32(name)))
