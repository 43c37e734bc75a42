"""The example store: a data set of conversations as tokens on disk, mapped into memory.

A store is a folder, read-only once built::

    manifest.json            what it was built from, counts, and the size and checksum of every other file
    train/, held_out/        the two splits
        tokens.bin           int32, sequences end to end
        learnt.bin           uint8, for each token whether it is learnt
        starts.bin           int64 [sequences + 1], where each sequence begins
        labels.bin           uint8, of ratings: for each example whether its answer is good

An *example* is what is learnt from at once, of ``width`` sequences: a conversation is one of one, a preference one of
two, the chosen one first. A rating is one of two: the conversation with its answer, and then with the answer to
another, which tells what the model finds probable after this question whatever is asked.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from penstock import __version__
from penstock.core.config import Config
from penstock.core.errors import DataError, UsageError
from penstock.core.files import atomic_folder, explain_os_errors, read_json, write_json
from penstock.core.progress import Reporter, silent
from penstock.data.chats.messages import Conversation, conversation, preference, rating
from penstock.data.chats.template import Learnt, Template, Written
from penstock.data.corpora.records import Record, Records
from penstock.data.manifest import MANIFEST, SPLITS, SplitName, StoredFile, damaged, map_file

VERSION = 1

#: What a data set is read as, and how many sequences make an example of it.
Kind = Literal["chats", "preferences", "ratings"]
WIDTHS: dict[Kind, int] = {"chats": 1, "preferences": 2, "ratings": 2}

DTYPES = {"tokens": "<i4", "learnt": "u1", "starts": "<i8"}
#: The file that ratings have beside them.
LABELS = "labels"


class Example(NamedTuple):
    """The sequences of an example, and of a rating whether its answer is good."""

    sequences: list[Written]
    good: bool | None = None


class Counts(Config):
    """Size of a split; ``learnt`` of its ``tokens`` are predicted."""

    examples: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    learnt: NonNegativeInt = 0


class ExampleManifest(Config):
    """The contents of ``manifest.json``.

    ``tokenizer`` is a fingerprint of the tokenizer, and ``template`` one of the chat template. ``skipped`` records were
    bad and left out, the first as it says. ``ends`` are the special tokens that end answers.
    """

    example_store: int = VERSION
    written_by: str
    kind: Kind
    source: dict[str, Any]
    held_out: float
    learnt: Learnt
    tokenizer: str
    template: str
    vocabulary: PositiveInt
    ends: tuple[NonNegativeInt, ...]
    skipped: NonNegativeInt = 0
    first_skipped: str = ""
    splits: dict[SplitName, Counts]
    files: tuple[StoredFile, ...]


class Examples:
    """A split of a store.

    Attributes:
        width: sequences an example.
        count: how many examples.
        counts: their size.
        extras: float32 [sequences] each, what a batch says of the sequences, by name.
        tokenwise: [learnt tokens, ...] each, what a batch says of the tokens that are learnt, by name.
    """

    def __init__(self, folder: Path, manifest: ExampleManifest, name: SplitName) -> None:
        self.width, self.counts = WIDTHS[manifest.kind], manifest.splits[name]
        self.count = self.counts.examples
        arrays = {part: map_file(folder / name / f"{part}.bin", dtype) for part, dtype in DTYPES.items()}
        self._tokens, self._learnt, self._starts = arrays["tokens"], arrays["learnt"], arrays["starts"]
        sizes = (len(self._tokens), len(self._learnt), len(self._starts))
        wanted = (self.counts.tokens, self.counts.tokens, self.width * self.count + 1)
        if sizes != wanted or int(self._starts[-1]) != self.counts.tokens:
            raise damaged(folder / name, "its files do not fit the counts of the manifest")
        self.extras: dict[str, npt.NDArray[np.float32]] = {}
        self.tokenwise: dict[str, npt.NDArray[Any]] = {}
        if manifest.kind == "ratings":
            labels = map_file(folder / name / f"{LABELS}.bin", "u1")
            if len(labels) != self.count:
                raise damaged(folder / name, "its labels do not fit the counts of the manifest")
            self.extras["label"] = np.repeat(labels.astype(np.float32), self.width)

    def sequences(self, example: int) -> range:
        """The numbers of an example's sequences."""
        return range(example * self.width, (example + 1) * self.width)

    def sizes(self) -> npt.NDArray[np.int64]:
        """The tokens of each example."""
        return np.diff(self._starts[:: self.width])

    def read(self, sequence: int, limit: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """The first ``limit`` tokens of a sequence, and which of them are learnt."""
        begin, end = int(self._starts[sequence]), int(self._starts[sequence + 1])
        end = min(end, begin + limit)
        return self._tokens[begin:end], self._learnt[begin:end].astype(np.bool_)

    @functools.cached_property
    def learnt_before(self) -> npt.NDArray[np.int64]:
        """[sequences + 1], how many learnt tokens stand before each sequence; a first token is never predicted."""
        predicted = self._learnt.astype(np.int64)
        predicted[self._starts[:-1]] = 0
        before: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(predicted)])[self._starts]
        return before

    def learns(self, example: int, limit: int) -> bool:
        """Whether something is learnt from the first ``limit`` tokens of an example's first sequence."""
        return bool(self.read(example * self.width, limit)[1][1:].any())


class ExampleStore:
    """A store in ``folder``: :meth:`build` makes one, :meth:`open` finds one."""

    def __init__(self, folder: Path, manifest: ExampleManifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def build(
        cls,
        records: Records,
        kind: Kind,
        template: Template,
        folder: Path,
        *,
        learnt: Learnt = "answers",
        held_out: float = 0.02,
        skip_bad: bool = False,
        progress: Reporter = silent,
    ) -> Self:
        """Writes a store at ``folder``, a whole one or none.

        Args:
            records: the data set.
            kind: what it is read as.
            template: writes the conversations.
            folder: the store's folder, which is not there yet.
            learnt: which part of a conversation; of preferences and ratings it is the last answer.
            held_out: the share that is set aside, chosen by a hash of the first sequence's tokens.
            skip_bad: leave out bad records and count them, instead of giving up.
            progress: told of records read.

        Raises:
            DataError: a record is bad (the message says where and why), or nothing is left to train on.
        """
        written = _rated(records, template) if kind == "ratings" else _written(records, kind, template, learnt)
        skipped, first = 0, ""
        with atomic_folder(folder) as partial:
            with contextlib.ExitStack() as stack, progress(f"reading {kind}", None, "record") as bar:
                writers = {name: stack.enter_context(_Writer(partial / name, kind)) for name in SPLITS}
                for item in written:
                    bar.advance(1)
                    if not isinstance(item, DataError):
                        writers[_side(item, held_out)].add(item)
                    elif skip_bad:
                        skipped, first = skipped + 1, first or item.what
                    else:
                        raise _bad(item)
                counts = {name: writer.counts for name, writer in writers.items()}
            if not counts["train"].examples:
                raise DataError(
                    f"there is nothing to train on in {_named(records)}"
                    + (f": {skipped:,} records were skipped, the first since {first}" if skipped else "")
                )
            manifest = ExampleManifest(
                written_by=f"penstock {__version__}",
                kind=kind,
                source=records.describe(),
                held_out=held_out,
                learnt=learnt,
                tokenizer=template.fingerprint,
                template=template_fingerprint(template),
                vocabulary=len(template.tokenizer),
                ends=tuple(sorted(template.ends)),
                skipped=skipped,
                first_skipped=first,
                splits=counts,
                files=tuple(StoredFile.of(path, partial) for path in sorted(partial.rglob("*.bin"))),
            )
            write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The store at ``folder``.

        Raises:
            UsageError: there is none.
            DataError: it is damaged.
        """
        path = folder / MANIFEST
        tree = read_json(path) if path.is_file() else None
        if not isinstance(tree, dict) or "example_store" not in tree:
            raise UsageError(f"there is no store of conversations in {folder}")
        try:
            manifest = ExampleManifest.model_validate(tree)
        except ValidationError as error:
            raise damaged(path, str(error.errors()[0]["msg"])) from error
        for file in manifest.files:
            file.check(folder, contents=False)
        return cls(folder, manifest)

    def split(self, name: SplitName) -> Examples:
        """The examples to train on, or those held out."""
        return Examples(self.folder, self.manifest, name)


def template_fingerprint(template: Template) -> str:
    """A hash of the chat template, in hex."""
    return hashlib.blake2b(str(template.tokenizer.chat_template).encode(), digest_size=16).hexdigest()


def _written(records: Records, kind: Kind, template: Template, learnt: Learnt) -> Iterator[Example | DataError]:
    """The examples of a data set as tokens, and in the place of each bad record what is wrong with it."""
    for record in records.records():
        if isinstance(record, DataError):
            yield record
            continue
        try:
            yield _example(record, kind, template, learnt)
        except DataError as fault:
            yield fault


def _example(record: Record, kind: Kind, template: Template, learnt: Learnt) -> Example:
    where = record.where
    if kind == "preferences":
        pair = preference(record.contents, where)
        return Example([template.write(chat, where, "last") for chat in pair])
    return Example([template.write(conversation(record.contents, where), where, learnt)])


def _rated(records: Records, template: Template) -> Iterator[Example | DataError]:
    """The ratings of a data set, each with the answer of the one before it in the place of its own; before the first
    stands the last."""
    first: Rated | None = None
    before: Rated | None = None
    for record in records.records():
        try:
            if isinstance(record, DataError):
                raise record
            rated = Rated(*rating(record.contents, record.where), record.where)
            if before is None:
                template.write(rated.chat, rated.where, "last")  # what is wrong with it is told in its turn
                first = rated
            else:
                yield rated.example(before, template)
            before = rated
        except DataError as fault:
            yield fault
    if first is not None and before is not None:
        if first is before:
            yield DataError(f"{first.where} is the only rating, and each needs another one beside it")
        else:
            yield first.example(before, template)


class Rated(NamedTuple):
    """A conversation, whether its last answer is good, and where it stands."""

    chat: Conversation
    good: bool
    where: str

    def example(self, other: Rated, template: Template) -> Example:
        """This as an example, with the answer of the ``other`` one as that to another question."""
        foreign = Conversation([*self.chat.messages[:-1], other.chat.messages[-1]], self.chat.tools)
        return Example([template.write(chat, self.where, "last") for chat in (self.chat, foreign)], self.good)


def _side(example: Example, share: float) -> SplitName:
    """Where an example belongs: the tokens of its first sequence alone decide, so that copies stay together."""
    digest = hashlib.blake2b(example.sequences[0].tokens.astype("<i4").tobytes(), digest_size=8)
    return "held_out" if int.from_bytes(digest.digest(), "little") < share * 2**64 else "train"


def _bad(fault: DataError) -> DataError:
    hint = f"{fault.hint} " if fault.hint else ""
    return DataError(fault.what, hint=f"{hint}Mend it, or set data.skip_bad=true to leave such records out, counted.")


def _named(records: Records) -> str:
    options: Mapping[str, Any] = records.describe()
    return f"{records.policy_name} {options.get('path', '')}".strip()


class _Writer:
    """Writes a split, example by example."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = folder
        self._parts = DTYPES | ({LABELS: "u1"} if kind == "ratings" else {})
        self._examples = self._tokens = self._learnt = 0

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        with explain_os_errors(f"cannot write {self._folder}"):
            self._folder.mkdir()
            self._files = {
                part: self._stack.enter_context((self._folder / f"{part}.bin").open("wb")) for part in self._parts
            }
        self._put("starts", np.zeros(1))
        return self

    def __exit__(self, *_: object) -> None:
        with explain_os_errors(f"cannot write {self._folder}"):
            self._stack.close()

    def add(self, example: Example) -> None:
        """Appends an example."""
        for written in example.sequences:
            self._put("tokens", written.tokens)
            self._put("learnt", written.learnt)
            self._tokens += len(written.tokens)
            self._put("starts", np.array([self._tokens]))
            self._learnt += int(written.learnt[1:].sum())
        if example.good is not None:
            self._put(LABELS, np.array([example.good]))
        self._examples += 1

    @property
    def counts(self) -> Counts:
        """What was written."""
        return Counts(examples=self._examples, tokens=self._tokens, learnt=self._learnt)

    def _put(self, part: str, values: npt.NDArray[Any]) -> None:
        with explain_os_errors(f"cannot write {self._folder}"):
            self._files[part].write(values.astype(self._parts[part]).tobytes())
