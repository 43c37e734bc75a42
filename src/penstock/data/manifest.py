"""What a token store says about itself, and whether that is so.

A store is a folder, read-only once built::

    manifest.json            what it was built from, counts, and the size and checksum of every other file
    tokenizer/               the tokenizer, as transformers reads it
    train/, held_out/        the two splits
        tokens-00000.bin     token ids, little-endian uint16 or uint32, each document as the tokenizer begins a
                             text (with BOS, or nothing), and an end-of-text token after it
        index.bin            int64 [3, documents + 1]: where each document's tokens, text bytes and name bytes start
        names.bin            the documents' names, UTF-8, end to end

Documents lie in pseudo-random order, so that neighbours in the token stream are unrelated. All shards of tokens but the
last hold ``shard_tokens``; a document may begin in one and end in the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from penstock.core.config import Config
from penstock.core.errors import DataError, UsageError
from penstock.core.files import checksum, explain_os_errors, read_json

VERSION = 1
MANIFEST = "manifest.json"

SplitName = Literal["train", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "held_out")


class StoredFile(Config):
    """A file of the store: its path in the folder, its size in bytes and its BLAKE2b-256."""

    path: str
    size: NonNegativeInt
    checksum: str

    @classmethod
    def of(cls, path: Path, folder: Path) -> StoredFile:
        """Measures ``path``, which lies in ``folder``."""
        return cls(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, checksum=checksum(path))

    def check(self, folder: Path, *, contents: bool) -> None:
        """Compares the file in ``folder`` with this record: its size, and its ``contents`` too if wanted.

        Raises:
            DataError: they differ; the message names the file.
        """
        path = folder / self.path
        with explain_os_errors(f"cannot read {path}"):
            if not path.is_file():
                raise damaged(path, "it is missing")
            size = path.stat().st_size
            if size != self.size:
                raise damaged(path, f"it has {size} bytes instead of {self.size}")
            if contents and checksum(path) != self.checksum:
                raise damaged(path, "its contents do not fit its checksum")


class Counts(Config):
    """Size of a split. ``tokens`` include those around each document; ``bytes`` are UTF-8 bytes of text."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt


class Manifest(Config):
    """The contents of ``manifest.json``.

    ``tokenizer`` is the fingerprint; ``vocabulary`` exceeds every token id, and ``vocabulary_asked`` is how many tokens
    a new tokenizer was to have (it has fewer where there is little text). ``begin_of_text`` and ``end_of_text`` are the
    special tokens around each document. ``skipped`` documents were damaged and left out, the first as it says.
    """

    token_store: int = VERSION
    written_by: str
    corpus: dict[str, Any]
    seed: int
    held_out: float
    tokenizer: str
    vocabulary: PositiveInt
    vocabulary_asked: PositiveInt | None = None
    skipped: NonNegativeInt = 0
    first_skipped: str = ""
    begin_of_text: str = ""
    begin_of_text_ids: tuple[NonNegativeInt, ...] = ()
    end_of_text: str
    end_of_text_id: NonNegativeInt
    dtype: Literal["<u2", "<u4"]
    shard_tokens: PositiveInt
    splits: dict[SplitName, Counts]
    files: tuple[StoredFile, ...]

    @property
    def left_out(self) -> str:
        """How many documents were skipped, and why, in words; nothing where none was."""
        return f"{self.skipped:,} documents were skipped, the first since {self.first_skipped}" if self.skipped else ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in ``folder``.

    Raises:
        UsageError: there is none.
        DataError: it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"there is no token store in {folder}", hint="Make one with penstock data build.")
    tree = read_json(path)
    if not isinstance(tree, dict) or "token_store" not in tree:
        raise damaged(path, "it is not the manifest of a token store")
    if tree["token_store"] != VERSION:
        raise DataError(
            f"{path} is of version {tree['token_store']!r}, and this Penstock reads version {VERSION}",
            hint="Build the store again with penstock data build.",
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{where}: {first['msg']}") from error


def damaged(path: Path, why: str) -> DataError:
    """The error about a file of a store that is not as it was written."""
    return DataError(f"{path} is damaged: {why}", hint="Build the store again with penstock data build.")


def map_file(path: Path, dtype: str) -> npt.NDArray[Any]:
    """A file as a read-only array, mapped into memory."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    # A plain array over the same memory: slices of np.memmap itself are several times slower to make.
    return np.asarray(np.memmap(path, dtype, mode="r"))
