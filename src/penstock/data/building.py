"""Building a token store: encode, spill, sort, write.

Documents arrive in the order of the corpus and leave in pseudo-random order. They are encoded as they come and appended
to a temporary file, with a small record of each; when the last has come, the records are sorted and the tokens copied
once, in their final order. Memory holds a few batches of text, and the records: about a hundred bytes a document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from penstock import __version__
from penstock.core.errors import DataError, UsageError
from penstock.core.files import atomic_folder, write_json
from penstock.core.progress import Reporter, silent
from penstock.data import pieces
from penstock.data.ahead import map_ahead
from penstock.data.corpora.contract import Corpus, Document
from penstock.data.manifest import MANIFEST, SPLITS, Counts, Manifest, StoredFile, map_file
from penstock.data.tokenizer import Around, fingerprint, save_tokenizer, size_of
from penstock.models.companions import copy_companions

#: Tokens a shard, characters a batch, and batches under way where nothing else is asked.
SHARD_TOKENS = 1 << 30
BATCH_CHARACTERS = 1 << 20
WORKERS = 2

#: What is kept of a document while its tokens and name lie in the spill.
RECORD = np.dtype(
    [
        ("held_out", "?"),
        ("order", "<u8"),
        ("bytes", "<i8"),
        ("token_start", "<i8"),
        ("tokens", "<i8"),
        ("name_start", "<i8"),
        ("name_bytes", "<i8"),
    ]
)

Records = npt.NDArray[np.void]


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out. Its contents alone decide: copies stay together, and no other document matters.

    A larger ``share`` holds out the same documents and more.
    """
    return _uniform(_digest(text.encode())) < share


@dataclasses.dataclass
class Skipped:
    """Documents that were damaged and left out: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def reading(self, corpus: Corpus) -> Iterator[Document]:
        """The other documents."""
        for item in corpus.items():
            if isinstance(item, Document):
                yield item
            else:
                self.count += 1
                self.first = self.first or item.what


def readable(corpus: Corpus, skipped: Skipped | None) -> Iterator[Document]:
    """The documents of a corpus, without those that are damaged if they are to be counted in ``skipped``."""
    return corpus.documents() if skipped is None else skipped.reading(corpus)


def training_texts(
    corpus: Corpus, held_out: float, progress: Reporter = silent, skip_bad: bool = False
) -> Iterator[str]:
    """The texts of ``corpus`` that are not held out: those that a tokenizer may learn from.

    Raises:
        UsageError: ``held_out`` is not in [0, 1).
        DataError: there is no such text, or a document is damaged.
    """
    _require_share(held_out)
    found = kept = 0
    with progress("reading", corpus.size(), "B") as bar:
        for document in readable(corpus, Skipped() if skip_bad else None):
            found += 1
            bar.advance(len(document.text))
            if not is_held_out(document.text, held_out):
                kept += 1
                yield document.text
    _require_documents(corpus, found, kept)


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    held_out: float,
    seed: int,
    around: Around,
    beside: Path | None,
    vocabulary_asked: int | None,
    skip_bad: bool,
    workers: int | None,
    progress: Reporter,
) -> None:
    """Writes the store; see :meth:`penstock.data.store.TokenStore.build`."""
    _require_share(held_out)
    if folder.exists() and not _replaceable(folder):
        raise UsageError(f"{folder} exists and is not a token store", hint="Choose a folder that does not exist.")
    encoder = _Encoder(tokenizer, around, held_out, seed)
    workers = workers or WORKERS
    skipped = Skipped()
    documents = readable(corpus, skipped if skip_bad else None)
    with atomic_folder(folder) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch, _Spill(Path(scratch), encoder.dtype) as spill:
            with progress("tokenizing", corpus.size(), "B") as bar:
                for batch in map_ahead(encoder, _batches(documents), threads=workers, depth=workers):
                    spill.add(batch)
                    bar.advance(sum(entry.bytes for entry in batch))
            records = spill.records()
            sides = {name: records[records["held_out"] == (name == "held_out")] for name in SPLITS}
            _require_documents(corpus, len(records), len(sides["train"]))
            with progress("writing", int(records["tokens"].sum()), "tok") as bar:
                for name, chosen in sides.items():
                    for count in _write_split(partial / name, chosen, spill):
                        bar.advance(count)
        if beside is None:
            save_tokenizer(tokenizer, partial / "tokenizer", around.end_of_text)
        else:
            copy_companions(beside, partial / "tokenizer")
        manifest = Manifest(
            written_by=f"penstock {__version__}, Python {platform.python_version()}",
            corpus=corpus.describe(),
            seed=seed,
            held_out=held_out,
            tokenizer=fingerprint(tokenizer),
            vocabulary=encoder.vocabulary,
            vocabulary_asked=vocabulary_asked,
            begin_of_text=around.begin_of_text,
            begin_of_text_ids=encoder.beginning,
            end_of_text=around.end_of_text,
            end_of_text_id=encoder.end_of_text_id,
            skipped=skipped.count,
            first_skipped=skipped.first,
            dtype=encoder.dtype,
            shard_tokens=SHARD_TOKENS,
            splits={name: _count(chosen) for name, chosen in sides.items()},
            files=tuple(StoredFile.of(path, partial) for path in sorted(partial.rglob("*")) if path.is_file()),
        )
        write_json(partial / MANIFEST, manifest.model_dump(mode="json"))


def _replaceable(folder: Path) -> bool:
    """Whether nothing is lost that is not a token store."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))


def _require_share(held_out: float) -> None:
    if not 0 <= held_out < 1:
        raise UsageError(f"cannot hold out {held_out} of the documents: the share must be at least 0 and below 1")


def _require_documents(corpus: Corpus, found: int, kept: int) -> None:
    if not found:
        options = ", ".join(f"{key} {value}" for key, value in corpus.describe().items() if key != "name")
        raise DataError(f"the corpus is empty: there is no text in {corpus.policy_name} ({options})")
    if not kept:
        raise DataError(f"all {found} documents are held out", hint="Hold out a smaller share, or add documents.")


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16, person=b"penstock content").digest()


def _uniform(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "little") / 2**64


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An encoded document; ``order`` is its sort key in the split."""

    name: bytes
    tokens: npt.NDArray[Any]
    bytes: int
    held_out: bool
    order: int


class _Encoder:
    """Encodes batches of documents. Several threads may call it."""

    def __init__(self, tokenizer: Tokenizer, around: Around, held_out: float, seed: int) -> None:
        self.beginning, self.end_of_text_id = around.beginning, around.end
        self.vocabulary = size_of(tokenizer)
        self.dtype: Literal["<u2", "<u4"] = "<u2" if self.vocabulary <= 1 << 16 else "<u4"
        # A special token's name in a document is text like any other: only our own end-of-text tokens end documents.
        self._tokenizer = pieces.plain(tokenizer)
        self._held_out, self._seed = held_out, seed

    def __call__(self, documents: list[Document]) -> list[_Entry]:
        short = [document.text for document in documents if len(document.text) <= pieces.PIECE]
        encodings = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            self._entry(document, [next(encodings).ids] if len(document.text) <= pieces.PIECE else self._long(document))
            for document in documents
        ]

    def _long(self, document: Document) -> Iterator[list[int]]:
        return pieces.encode(self._tokenizer, document.text)

    def _entry(self, document: Document, parts: Iterable[list[int]]) -> _Entry:
        payload, name = document.text.encode(), document.name.encode()
        digest = _digest(payload)
        order = hashlib.blake2b(b"%d/%b/%b" % (self._seed, digest, name), digest_size=8).digest()
        return _Entry(
            name=name,
            tokens=np.concatenate(
                [np.array(part, self.dtype) for part in (self.beginning, *parts, (self.end_of_text_id,))]
            ),
            bytes=len(payload),
            held_out=_uniform(digest) < self._held_out,
            order=int.from_bytes(order, "little"),
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of at least ``BATCH_CHARACTERS``."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Spill:
    """Tokens and names in the order in which the documents came, in two temporary files."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._paths = (folder / "tokens", folder / "names")
        self._files = tuple(path.open("wb") for path in self._paths)
        self._dtype = dtype
        self._records: list[Records] = []
        self._token_count = self._name_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, batch: list[_Entry]) -> None:
        """Appends a batch."""
        records = np.empty(len(batch), RECORD)
        for i, entry in enumerate(batch):
            tokens, name = len(entry.tokens), len(entry.name)
            where = (self._token_count, tokens, self._name_bytes, name)
            records[i] = (entry.held_out, entry.order, entry.bytes, *where)
            self._files[0].write(entry.tokens.data)
            self._files[1].write(entry.name)
            self._token_count += tokens
            self._name_bytes += name
        self._records.append(records)

    def records(self) -> Records:
        """The records of all documents in their final order. Nothing is added after this."""
        for file in self._files:
            file.flush()
        self.tokens, self.names = map_file(self._paths[0], self._dtype), map_file(self._paths[1], "u1")
        records = np.concatenate([np.empty(0, RECORD), *self._records])
        return records[np.argsort(records["order"], kind="stable")]


def _write_split(folder: Path, records: Records, spill: _Spill) -> Iterator[int]:
    """Writes a split with the documents of ``records``; yields the numbers of tokens written, piece by piece."""
    folder.mkdir()
    index = np.zeros((3, len(records) + 1), "<i8")
    for row, field in zip(index, ("tokens", "bytes", "name_bytes"), strict=True):
        np.cumsum(records[field], out=row[1:])
    index.tofile(folder / "index.bin")
    with (folder / "names.bin").open("wb") as names:
        for start, count in zip(records["name_start"].tolist(), records["name_bytes"].tolist(), strict=True):
            names.write(spill.names[start : start + count].data)
    starts, total = index[0], int(index[0, -1])
    for number, begin in enumerate(range(0, total, SHARD_TOKENS)):
        end = min(begin + SHARD_TOKENS, total)
        first = int(starts.searchsorted(begin, "right")) - 1
        last = int(starts.searchsorted(end, "left"))
        # From where in the spill to copy: the part of each document that lies in this shard.
        skipped = np.maximum(begin - starts[first:last], 0)
        sources = records["token_start"][first:last] + skipped
        lengths = np.minimum(starts[first + 1 : last + 1], end) - starts[first:last] - skipped
        with (folder / f"tokens-{number:05}.bin").open("wb") as file:
            for start, count in zip(sources.tolist(), lengths.tolist(), strict=True):
                file.write(spill.tokens[start : start + count].data)
                yield count


def _count(records: Records) -> Counts:
    return Counts(documents=len(records), tokens=int(records["tokens"].sum()), bytes=int(records["bytes"].sum()))
