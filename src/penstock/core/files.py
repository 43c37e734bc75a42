"""Writing files so that a reader never sees half of one, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.core.errors import PenstockError, UsageError

#: What a writer calls its unfinished work, and the folder that it is about to replace.
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.\w{8}\.(?P<kind>partial|old)")


def fsync_directory(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Makes the bytes of ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_os_errors(what: str) -> Iterator[None]:
    """Turns an :class:`OSError` inside the block into a :class:`PenstockError` that says what was being done."""
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno == errno.ENOSPC:
            hint = "The disk is full: free some space and run the same command again."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "Check the permissions of that path."
        where = f" ({error.filename})" if error.filename else ""
        raise PenstockError(f"{what}: {error.strerror or error}{where}", hint=hint) from error


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``target`` that becomes ``target`` when the block ends well.

    Every file is fsynced before the rename. On any failure the temporary folder is removed and ``target`` stays as
    it was. An existing ``target`` is replaced: it is set aside under a name ending in ``.old`` first, and a process
    killed between the two renames leaves it there, whole.
    """
    with explain_os_errors(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield temporary
            appear(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def appear(temporary: Path, target: Path) -> None:
    """Makes a finished folder durable, and gives it its name. One that has that name is replaced, as of
    :func:`atomic_folder`."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            fsync_file(path)
        else:
            fsync_directory(path)
    fsync_directory(temporary)
    temporary.chmod(0o755)
    old = temporary.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces the contents of ``path`` in one step."""
    payload = data.encode() if isinstance(data, str) else data
    with explain_os_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Clears away what killed writers left in ``folder``. Nobody may be writing there.

    A folder that was set aside, and whose successor never took its place, goes back to its name.
    """
    if not folder.is_dir():
        return
    with explain_os_errors(f"cannot clear up {folder}"):
        for path in sorted(folder.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if found is None:
                continue
            target = folder / found["target"]
            if found["kind"] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process while the block runs. A process that is killed lets go of it too.

    Where the file system knows no locks, nothing is held.

    Raises:
        UsageError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is at work in {folder}", hint="Wait for it, or stop it first."
            ) from error
        except OSError:
            pass  # no locks here
        yield
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """Where files are kept that can be made again, of the kind ``name``; it need not exist.

    Raises:
        PenstockError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "penstock", name)
    except RuntimeError as error:
        raise PenstockError(
            f"{name} are kept in the home folder, and this user has none",
            hint="Name a folder for them in the variable XDG_CACHE_HOME.",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; a missing or malformed one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PenstockError(f"{path} does not exist") from error
    except OSError as error:
        raise PenstockError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PenstockError(f"{path} is not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file; a missing or undecodable one is an error that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def checksum(path: Path) -> str:
    """BLAKE2b-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
