"""Files of a corpus: those below a folder, symbolic links followed, and their bytes, whether compressed or not."""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from penstock.core.errors import DataError, UsageError
from penstock.core.files import explain_os_errors

#: Endings of compressed files.
COMPRESSED = (".gz", ".zst")


def plain_name(path: PurePath) -> str:
    """The file's name without the ending that says how it is compressed."""
    return path.stem if path.suffix in COMPRESSED else path.name


def is_compressed(path: PurePath) -> bool:
    """Whether the name says so."""
    return path.suffix in COMPRESSED


def below(folder: Path) -> list[Path]:
    """All files below ``folder``, sorted, hidden ones left out. Links to folders are followed, but into no folder that
    they lie in themselves."""
    found: list[Path] = []

    def visit(here: Path, above: frozenset[str]) -> None:
        real = os.path.realpath(here)
        if real in above:
            return
        with explain_os_errors(f"cannot read {here}"):
            entries = sorted(here.iterdir())
        for path in entries:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                visit(path, above | {real})
            elif path.is_file():
                found.append(path)

    visit(folder, frozenset())
    return sorted(found)


def matches(path: PurePath, pattern: str) -> bool:
    """Whether a relative path fits a glob pattern, in which ``**`` is any number of folders, or none."""
    return _fits(path.parts, PurePath(pattern).parts)


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[skipped:], wanted[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def source_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """``path`` itself if it is a file, else the files below that folder whose names end so, compressed or not.

    Raises:
        UsageError: there is no such path, or no such file below it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {path}")
    found = [file for file in below(path) if plain_name(file).endswith(suffixes)]
    if not found:
        raise UsageError(f"there is no {' or '.join(suffixes)} file below {path}")
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as they are read.

    Raises:
        DataError: it is compressed, and damaged or cut off.
        PenstockError: it cannot be read.
    """
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with explain_os_errors(f"cannot read {path}"), path.open("rb") as file:
        try:
            yield _decompressed(file, path.suffix)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is not a whole {kind} file: {error}") from error
        except OSError as error:
            if kind is None or error.errno is not None:
                raise
            raise DataError(f"{path} is not a whole {kind} file: {error}") from error  # Arrow's have no number


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 18))
    return file


def sizes(files: Sequence[Path]) -> int | None:
    """Bytes of text in ``files``, None where some are compressed."""
    return None if any(map(is_compressed, files)) else sum(file.stat().st_size for file in files)
