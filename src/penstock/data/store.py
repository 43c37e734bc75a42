"""The token store: a tokenized corpus on disk, mapped into memory. Its layout is in :mod:`penstock.data.manifest`."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from penstock.core.errors import DataError
from penstock.core.progress import Reporter, silent
from penstock.data.building import build_store
from penstock.data.corpora.contract import Corpus
from penstock.data.manifest import SPLITS, Manifest, SplitName, damaged, map_file, read_manifest
from penstock.data.tokenizer import AUTO, END_OF_TEXT, Around, fingerprint, load_tokenizer


class TokenStore:
    """A token store: :meth:`build` makes one, :meth:`open` finds one.

    Attributes:
        folder: where it is.
        manifest: what it says about itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: Path,
        *,
        held_out: float = 0.02,
        seed: int = 0,
        begin_of_text: str = AUTO,
        end_of_text: str = END_OF_TEXT,
        beside: Path | None = None,
        vocabulary_asked: int | None = None,
        skip_bad: bool = False,
        workers: int | None = None,
        progress: Reporter = silent,
    ) -> TokenStore:
        """Tokenizes ``corpus`` into a new store at ``folder``: a whole one or none. An older store there is replaced.

        The corpus is streamed, never held. Special tokens that stand in the text are encoded as plain text.

        Args:
            corpus: the documents.
            tokenizer: any that has the token ``end_of_text``.
            folder: the store's folder.
            held_out: the share of documents that :func:`~penstock.data.building.is_held_out` sets aside.
            seed: of the order of the documents.
            begin_of_text: the token before each document; ``auto`` is what the tokenizer puts there by itself, and
                an empty name is none.
            end_of_text: the token after each document.
            beside: the folder that the tokenizer came from, whose files go into the store as they are.
            skip_bad: leave out documents that are damaged, and count them in the manifest, instead of giving up.
            vocabulary_asked: how many tokens a new tokenizer was to have, for the record.
            workers: batches encoded at a time (None: 2). The tokenizer spreads each over all cores by itself.
            progress: told of bytes of text tokenized, then of tokens written.

        Raises:
            DataError: the corpus, or what is not held out of it, is empty, or a document is damaged.
            UsageError: ``folder`` is something other than a token store, ``held_out`` is not in [0, 1), or the
                tokenizer has no such token.
        """
        build_store(
            corpus,
            tokenizer,
            folder,
            held_out=held_out,
            seed=seed,
            around=Around.of(tokenizer, begin_of_text, end_of_text),
            beside=beside,
            vocabulary_asked=vocabulary_asked,
            skip_bad=skip_bad,
            workers=workers,
            progress=progress,
        )
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, tokenizer: Tokenizer | None = None, verify: bool = False) -> TokenStore:
        """Opens the store at ``folder``. With ``verify``, reads every byte of it too.

        Raises:
            UsageError: there is no store.
            DataError: a file is missing, has another size or (with ``verify``) other contents than the manifest says;
                the manifest is of another version; or ``tokenizer`` is given and not the store's own.
        """
        store = cls(folder, read_manifest(folder))
        for file in store.manifest.files:
            file.check(folder, contents=False)
        for name in SPLITS:
            store.split(name)
        if tokenizer is not None and fingerprint(tokenizer) != store.manifest.tokenizer:
            raise DataError(
                f"the token store {folder} was built with another tokenizer",
                hint=f"Use the one in {folder / 'tokenizer'}, or build a store with yours.",
            )
        if verify:
            store.verify()
        return store

    def verify(self, progress: Reporter = silent) -> None:
        """Compares every file with its checksum.

        Raises:
            DataError: a file is damaged; the message names it.
        """
        with progress("verifying", sum(file.size for file in self.manifest.files), "B") as bar:
            for file in self.manifest.files:
                file.check(self.folder, contents=True)
                bar.advance(file.size)
        if fingerprint(self.tokenizer) != self.manifest.tokenizer:
            raise damaged(self.folder / "manifest.json", "it does not name the tokenizer beside it")

    def split(self, name: SplitName) -> Split:
        """The documents to train on, or those held out."""
        return Split(self.folder, self.manifest, name)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was built with."""
        return load_tokenizer(self.folder / "tokenizer")


class Split:
    """Documents end to end, as one stream of tokens.

    Attributes:
        documents: how many documents.
        prefix: how many tokens begin each document that are no text, such as BOS.
        tokens: how many tokens, with those around each document.
        bytes: how many UTF-8 bytes of text.
    """

    def __init__(self, folder: Path, manifest: Manifest, name: SplitName) -> None:
        counts = manifest.splits[name]
        self.documents, self.tokens, self.bytes = counts.documents, counts.tokens, counts.bytes
        self.prefix = len(manifest.begin_of_text_ids)
        self._shard_tokens = manifest.shard_tokens
        shards = sorted(file.path for file in manifest.files if file.path.startswith(f"{name}/tokens-"))
        self._shards = [map_file(folder / shard, manifest.dtype) for shard in shards]
        self._names = map_file(folder / name / "names.bin", "u1")
        path = folder / name / "index.bin"
        index = map_file(path, "<i8")
        if index.size != 3 * (self.documents + 1):
            raise damaged(path, f"it does not fit the manifest's {self.documents} documents")
        self._starts, self._byte_starts, self._name_starts = index.reshape(3, -1)
        ends = (int(self._starts[-1]), int(self._byte_starts[-1]), int(self._name_starts[-1]))
        if ends != (self.tokens, self.bytes, len(self._names)) or self.tokens != sum(map(len, self._shards)):
            raise damaged(path, "it does not fit the counts of the manifest")

    def read(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Tokens [start, start + count) of the stream, and the number of the document that each belongs to.

        Raises:
            IndexError: the stream does not reach so far.
        """
        stop = start + count
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        tokens = np.empty(count, np.int32)
        done = 0
        while done < count:
            shard, offset = divmod(start + done, self._shard_tokens)
            piece = self._shards[shard][offset : offset + count - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
        first = int(self._starts.searchsorted(start, "right")) - 1
        last = int(self._starts.searchsorted(stop, "left"))
        lengths = np.diff(self._starts[first : last + 1].clip(start, stop))
        return tokens, np.arange(first, last, dtype=np.int32).repeat(lengths)

    def document(self, number: int) -> npt.NDArray[np.int32]:
        """The tokens of a document, its end-of-text token the last."""
        start, stop = self._span(self._starts, number)
        return self.read(start, stop - start)[0]

    def length(self, number: int) -> int:
        """The tokens of a document, with those around it."""
        start, stop = self._span(self._starts, number)
        return stop - start

    def document_bytes(self, number: int) -> int:
        """UTF-8 bytes of a document's text."""
        start, stop = self._span(self._byte_starts, number)
        return stop - start

    def name(self, number: int) -> str:
        """The name of a document."""
        start, stop = self._span(self._name_starts, number)
        return self._names[start:stop].tobytes().decode()

    def _span(self, starts: npt.NDArray[np.int64], number: int) -> tuple[int, int]:
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        return int(starts[number]), int(starts[number + 1])
