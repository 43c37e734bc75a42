"""The law of ``data.corpus``, over every registered policy."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from penstock.data.corpora.contract import Corpus
from penstock.policy import create, index

TEXTS = ["first text\n", "", "second\r\ntext", "ünïcödé 漢字 🙂", "", "last"]


def folder(path: Path) -> dict[str, Any]:
    for i, text in enumerate(TEXTS):
        (path / f"{i}.txt").write_bytes(text.encode())
    return {"path": path}


def jsonl(path: Path) -> dict[str, Any]:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (path / "a.jsonl").write_bytes(lines)
    (path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    return {"path": path}


def rows(path: Path) -> dict[str, Any]:
    parquet.write_table(pyarrow.table({"text": TEXTS}), path / "a.parquet", row_group_size=2)
    return {"path": path}


def listed(path: Path) -> dict[str, Any]:
    (path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return {"path": path}


def mixed(path: Path) -> dict[str, Any]:
    for make in (folder, jsonl, rows, listed):
        (path / make.__name__).mkdir()
        make(path / make.__name__)
    return {"path": path}


def mixture(path: Path) -> dict[str, Any]:
    whole = {"corpus": {"name": "folder", **folder(path)}, "weight": 2.5}
    return {"parts": [whole, {"corpus": {"name": "folder", "path": str(path)}, "weight": 0.7}]}


def saved(path: Path) -> dict[str, Any]:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path / "set")
    return {"path": str(path / "set")}


#: What makes a corpus of each kind, and the options that find it.
EXAMPLES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": mixed,
    "hf": saved,
    "json": listed,
    "jsonl": jsonl,
    "mixture": mixture,
    "parquet": rows,
    "stdlib": lambda _: {},
    "text": folder,
}


@pytest.fixture(params=index().names("data.corpus"))
def corpus(request, tmp_path) -> Corpus:
    assert request.param in EXAMPLES, f"add an example of the corpus {request.param!r} here"
    made = create("data.corpus", request.param, **EXAMPLES[request.param](tmp_path))
    assert isinstance(made, Corpus)
    return made


def test_every_pass_is_the_same(corpus):
    first = list(corpus.documents())
    assert first
    assert list(corpus.documents()) == first


def test_no_document_is_empty_and_no_name_comes_twice(corpus):
    documents = list(corpus.documents())
    assert all(document.text for document in documents)
    assert len({document.name for document in documents}) == len(documents)


def test_documents_are_streamed(corpus):
    passing = corpus.documents()
    assert next(passing) == next(corpus.documents())


def test_size_is_about_right(corpus):
    size = corpus.size()
    text = sum(len(document.text.encode()) for document in corpus.documents())
    assert size is None or text / 3 < size < 3 * text + 1000


def test_its_description_makes_it_again(corpus):
    described = json.loads(json.dumps(corpus.describe()))
    again = create("data.corpus", described.pop("name"), **described)
    assert again == corpus
