"""Kinds of files and of corpora: recognised, mixed, nested, damaged, weighted, and of the datasets library."""

from __future__ import annotations

import collections
import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from penstock.core.errors import DataError, UsageError
from penstock.data.building import Skipped
from penstock.data.corpora.contract import Corpus
from penstock.data.corpora.files import below
from penstock.data.corpora.folder import Folder
from penstock.data.corpora.hf import HuggingFace
from penstock.data.corpora.json_files import JsonFiles
from penstock.data.corpora.jsonl import JsonLines
from penstock.data.corpora.mixture import Mixture
from penstock.data.corpora.parquet import Parquet
from penstock.data.corpora.text import Text
from penstock.data.store import TokenStore
from penstock.policy import create


def read(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents()}


def lines(*texts: str, field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def _frames(payload: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(payload)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def mixed(tmp_path) -> Path:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines("one", "two"))
    (folder / "b.ndjson.gz").write_bytes(gzip.compress(lines("three")))
    (folder / "deep" / "c.jsonl.zst").write_bytes(_frames(lines("four", "fünf" * 1000)))
    (folder / "d.json").write_text(json.dumps([{"text": "six"}, {"text": None}, {"text": "seven"}]))
    (folder / "package.json").write_text('{"name": "penstock"}')
    parquet.write_table(pyarrow.table({"text": ["eight"]}), folder / "e.parquet")
    (folder / "f.txt").write_text("nine")
    (folder / "g.txt.gz").write_bytes(gzip.compress(b"ten"))
    (folder / "h.py").write_text("eleven")
    return folder


def test_a_folder_recognises_the_kind_of_each_file(mixed):
    """No record is trained on as raw JSON."""
    assert read(Folder(path=mixed)) == {
        "a.jsonl:1": "one",
        "a.jsonl:2": "two",
        "b.ndjson.gz:1": "three",
        "d.json:0": "six",
        "d.json:2": "seven",
        "deep/c.jsonl.zst:1": "four",
        "deep/c.jsonl.zst:2": "fünf" * 1000,
        "e.parquet:0": "eight",
        "f.txt": "nine",
        "g.txt.gz": "ten",
        "h.py": "eleven",
        "package.json": '{"name": "penstock"}',
    }


def test_a_kind_can_be_read_alone(mixed):
    assert list(read(JsonLines(path=mixed))) == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.ndjson.gz:1",
        "deep/c.jsonl.zst:1",
        "deep/c.jsonl.zst:2",
    ]
    assert read(Text(path=mixed)) == {"f.txt": "nine", "g.txt.gz": "ten"}
    assert read(JsonFiles(path=mixed / "d.json")) == {"d.json:0": "six", "d.json:2": "seven"}


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "linked.txt").write_text("linked")
    (data / "sub" / "own.txt").write_text("own")
    (data / "link").symlink_to(other, target_is_directory=True)
    (data / "sub" / "up").symlink_to(data, target_is_directory=True)
    (other / "self").symlink_to(other, target_is_directory=True)
    (data / "nowhere").symlink_to(tmp_path / "missing")
    assert read(Folder(path=data)) == {"link/linked.txt": "linked", "sub/own.txt": "own"}
    assert len(below(data)) == 2


@pytest.mark.parametrize("make", ["jsonl", "json", "parquet"])
def test_a_field_in_a_field(tmp_path, make):
    records = [{"meta": {"text": "a", "n": 1}}, {"meta": {"text": "b", "n": 2}}]
    path = tmp_path / f"r.{make}"
    if make == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif make == "json":
        path.write_text(json.dumps(records))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    corpus = create("data.corpus", make, path=path, field="meta.text")
    assert list(read(corpus).values()) == ["a", "b"]
    assert list(read(Folder(path=tmp_path, field="meta.text")).values()) == ["a", "b"]
    for field in ("meta.txt", "mata.text"):
        with pytest.raises(DataError, match=r"has no (field|column) 'm.*did you mean '(meta|text|meta.text)'"):
            read(create("data.corpus", make, path=path, field=field))


@pytest.fixture
def damaged(tmp_path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    good = [f"text {i}" for i in range(20)]
    (folder / "a.jsonl").write_bytes(lines(*good) + b"{\n" + b'{"txt": 1}\n' + b'{"text": "\\ud800"}\n' + lines("last"))
    (folder / "b.txt").write_bytes(b"\xff")
    (folder / "c.txt").write_text("fine")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines("x" * 10, "y"))[:20])
    (folder / "e.jsonl.zst").write_bytes(_frames(lines(*(f"{i}" * 50 for i in range(3000))))[:-30])
    (folder / "f.parquet").write_bytes(b"PAR1 no")
    return folder


def test_what_is_damaged_is_skipped_and_counted_if_wanted(damaged):
    skipped = Skipped()
    texts = {document.text for document in skipped.reading(Folder(path=damaged))}
    assert {"text 0", "text 19", "last", "fine"} <= texts
    assert skipped.count == 7
    assert "a.jsonl, line 21 is not JSON" in skipped.first
    with pytest.raises(DataError, match="line 21 is not JSON"):
        read(Folder(path=damaged))


def test_a_store_says_how_much_was_skipped(damaged, tokenizer, tmp_path):
    store = TokenStore.build(Folder(path=damaged), tokenizer, tmp_path / "store", held_out=0, skip_bad=True)
    assert store.manifest.skipped == 7
    assert "line 21 is not JSON" in store.manifest.first_skipped
    with pytest.raises(DataError):
        TokenStore.build(Folder(path=damaged), tokenizer, tmp_path / "other", held_out=0)


def test_half_a_zstd_file_is_named(tmp_path):
    whole = _frames(lines(*(f"{i}" * 50 for i in range(3000))))
    for payload in (whole[:-30], b"not zstd at all"):
        (tmp_path / "a.jsonl.zst").write_bytes(payload)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst is not a whole zstd file"):
            read(JsonLines(path=tmp_path / "a.jsonl.zst"))


# Mixtures.


def test_the_weights_of_a_mixture_are_how_often_its_documents_come(listed):
    texts = [f"text {i}" for i in range(2000)]
    corpus = Mixture(parts=[{"corpus": listed.of(*texts), "weight": w} for w in (1, 2.25, 0.5)])
    found = collections.defaultdict(collections.Counter)
    for document in corpus.documents():
        found[document.name.split("/")[0]][document.text] += 1
    assert set(found["0"].values()) == {1}
    assert set(found["1"].values()) == {2, 3}
    assert set(found["2"].values()) == {1}
    assert sum(found["1"].values()) == pytest.approx(4500, abs=4 * (2000 * 0.25 * 0.75) ** 0.5)
    assert len(found["2"]) == pytest.approx(1000, abs=4 * (2000 * 0.25) ** 0.5)
    smaller = Mixture(parts=[{"corpus": listed.of(*texts), "weight": 0.25}])
    assert {document.text for document in smaller.documents()} < set(found["2"])


# Hugging Face data sets.


@pytest.fixture
def saved(tmp_path) -> Path:
    """A real data set on disk, with two splits and a nested field."""
    import datasets

    rows = [{"text": f"row {i}", "meta": {"body": f"body {i}"}} for i in range(5)] + [{"text": None, "meta": None}]
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_data_set_on_disk_is_read(saved):
    assert read(HuggingFace(path=str(saved))) == {f"train:{i}": f"row {i}" for i in range(5)}
    assert read(HuggingFace(path=str(saved), split="test")) == {"test:0": "row 0", "test:1": "row 1"}
    assert read(HuggingFace(path=str(saved / "test"))) == {"train:0": "row 0", "train:1": "row 1"}
    with pytest.raises(UsageError, match="has no split 'tset': did you mean 'test'"):
        read(HuggingFace(path=str(saved), split="tset"))
    with pytest.raises(DataError, match="row 5 of train"):
        read(HuggingFace(path=str(saved), field="meta.body"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_on_the_hub_is_loaded_as_the_library_wants_it(monkeypatch, streaming):
    """The library stands in for the network: the rows come as its own kinds of data sets give them."""
    import datasets

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        found = datasets.Dataset.from_dict({"body": ["a", "b"], "picture": [1, 2]})
        return found.to_iterable_dataset() if options["streaming"] else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = HuggingFace(path="org/name", subset="en", revision="v1", field="body", streaming=streaming)
    assert read(corpus) == read(corpus) == {"train:0": "a", "train:1": "b"}
    options = {"split": "train", "revision": "v1", "streaming": streaming}
    assert asked == [(("org/name", "en"), options)] * 2


def test_what_the_library_cannot_load_is_one_message(monkeypatch):
    import datasets

    def fails(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=r"the data set 'org/name' \(split 'train'\) cannot be loaded: no network"):
        read(HuggingFace(path="org/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"need the library 'datasets'\n.*penstock\[hf\]"):
        read(HuggingFace(path="org/name"))


def test_a_nested_column_that_is_no_text_is_refused(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([{"meta": {"n": 1}}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the column 'meta\.n' is of type int64, not string"):
        read(Parquet(path=tmp_path, field="meta.n"))
