from __future__ import annotations

import gzip
import json
import os
import random
import sysconfig
import tokenize
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from penstock.core.errors import ConfigError, DataError, PenstockError, UsageError
from penstock.data.corpora import stdlib
from penstock.data.corpora.contract import Corpus, Document
from penstock.data.corpora.folder import Folder
from penstock.data.corpora.jsonl import JsonLines
from penstock.data.corpora.parquet import Parquet
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.policy import create


def read(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents()}


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return folder


def test_text_must_be_unicode():
    with pytest.raises(DataError, match=r"there\.txt is not valid Unicode: surrogates not allowed at character 2"):
        Document("there.txt", "ab\ud800")


class TestStandardLibrary:
    def test_is_the_source_of_this_python(self):
        root = Path(sysconfig.get_path("stdlib"))
        found = read(StandardLibrary())
        for name in ("argparse.py", "asyncio/events.py", "encodings/cp037.py"):
            with tokenize.open(root / name) as file:
                assert found[name] == file.read()
        assert not [name for name in found if {"test", "tests", "site-packages", "idle_test"} & set(name.split("/"))]
        size = sum(len(text.encode()) for text in found.values())
        assert 8e6 < size < 20e6
        assert StandardLibrary().size() == pytest.approx(size, rel=0.01)

    @pytest.fixture
    def library(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setattr(stdlib, "library_root", lambda: tmp_path)
        return write(
            tmp_path,
            {
                "plain.py": "x = 1\r\n",
                "latin.py": "# coding: latin-1\ns = 'ä'\n".encode("latin-1"),
                "mark.py": b"\xef\xbb\xbfx = 2\n",
                "empty.py": "",
                "unknown_coding.py": "# coding: klingon\n",
                "not_utf8.py": b"s = '\xff'\n",
                "note.txt": "not Python",
                "_sysconfigdata__linux.py": "build_time_vars = {}\n",
                "package/__init__.py": "pass\n",
                "package/tests/test_it.py": "assert True\n",
                "test/test_that.py": "assert 1\n",
                "site-packages/numpy.py": "no\n",
                "__pycache__/old.py": "no\n",
            },
        )

    def test_decodes_as_python_does_and_leaves_out_what_is_not_source(self, library):
        assert read(StandardLibrary()) == {
            "latin.py": "# coding: latin-1\ns = 'ä'\n",
            "mark.py": "x = 2\n",
            "package/__init__.py": "pass\n",
            "plain.py": "x = 1\n",
        }

    def test_its_tests_come_if_wanted(self, library):
        extra = read(StandardLibrary(tests=True)).keys() - read(StandardLibrary()).keys()
        assert extra == {"package/tests/test_it.py", "test/test_that.py"}

    def test_a_python_without_sources_is_explained(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "python311.zip"))
        with pytest.raises(DataError, match="no folder with its standard library"):
            read(StandardLibrary())


class TestFolder:
    @given(
        files=st.dictionaries(
            st.text("abc", min_size=1, max_size=4).map(lambda name: f"{name[:-1]}/{name}.txt".lstrip("/")),
            st.text(max_size=40),
            max_size=6,
        )
    )
    @settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_gives_the_files_as_they_are(self, tmp_path_factory, files):
        folder = write(tmp_path_factory.mktemp("folder"), files)
        corpus = Folder(path=folder)
        assert read(corpus) == {name: text for name, text in files.items() if text}
        assert corpus.size() == sum(len(text.encode()) for text in files.values())

    def test_patterns_choose(self, tmp_path):
        write(tmp_path, {"a.py": "a", "deep/b.py": "b", "c.md": "c", ".git/d.py": "d", ".e.py": "e"})
        assert list(read(Folder(path=tmp_path))) == ["a.py", "c.md", "deep/b.py"]
        assert list(read(Folder(path=tmp_path, patterns=("**/*.py",)))) == ["a.py", "deep/b.py"]
        assert list(read(Folder(path=tmp_path, patterns=("*.py", "a.*", "*.md")))) == ["a.py", "c.md"]

    def test_a_binary_file_is_named_or_skipped(self, tmp_path):
        write(tmp_path, {"a.txt": "text", "b.bin": b"ab\xff\xfe"})
        with pytest.raises(DataError, match=r"b\.bin is not UTF-8 text: invalid start byte at byte 2"):
            read(Folder(path=tmp_path))
        assert read(Folder(path=tmp_path, skip_binary=True)) == {"a.txt": "text"}

    def test_what_is_no_folder_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="nowhere does not exist"):
            read(Folder(path=tmp_path / "nowhere"))
        write(tmp_path, {"file.txt": "text"})
        with pytest.raises(UsageError, match=r"file\.txt is not a folder"):
            read(Folder(path=tmp_path / "file.txt"))

    @pytest.mark.parametrize("pattern", ["", "/etc/*"])
    def test_a_pattern_that_cannot_be_searched_is_refused(self, tmp_path, pattern):
        with pytest.raises(UsageError, match="cannot search"):
            read(Folder(path=tmp_path, patterns=(pattern,)))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_an_unreadable_file_is_named(self, tmp_path):
        write(tmp_path, {"a.txt": "text"})
        (tmp_path / "a.txt").chmod(0)
        with pytest.raises(PenstockError, match=r"cannot read .*a\.txt: Permission denied"):
            read(Folder(path=tmp_path))


class TestJsonLines:
    @given(texts=st.lists(st.none() | st.text(max_size=30), max_size=8), compressed=st.booleans(), ascii=st.booleans())
    @settings(max_examples=30)
    def test_gives_every_text(self, tmp_path_factory, texts, compressed, ascii):
        lines = "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=ascii) + "\n" for text in texts).encode()
        path = tmp_path_factory.mktemp("jsonl") / ("a.jsonl.gz" if compressed else "a.jsonl")
        path.write_bytes(gzip.compress(lines) if compressed else lines)
        corpus = JsonLines(path=path)
        assert read(corpus) == {f"{path.name}:{i}": text for i, text in enumerate(texts, 1) if text}
        assert corpus.size() == (None if compressed else len(lines))

    def test_reads_all_files_of_a_folder(self, tmp_path):
        write(tmp_path, {"b.jsonl": '{"body": "b"}', "deep/a.jsonl": '\n{"body": "a"}\n', "c.txt": "no"})
        write(tmp_path, {"z.jsonl.gz": gzip.compress(b'{"body": "z"}')})
        assert read(JsonLines(path=tmp_path, field="body")) == {
            "b.jsonl:1": "b",
            "deep/a.jsonl:2": "a",
            "z.jsonl.gz:1": "z",
        }

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 2 is not JSON: Expecting property name"),
            (b"\xff", "line 2 is not JSON: .*utf-8"),
            ("[" * 100_000, "line 2 is not JSON: .*recursion"),
            ("[1]", "line 2 is not a JSON object but a list"),
            ('{"texts": "x"}', "line 2 has no field 'text': did you mean 'texts'"),
            ('{"text": 7}', "line 2: 'text' is not a string but a int"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, message):
        payload = line if isinstance(line, bytes) else line.encode()
        (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + payload)
        with pytest.raises(DataError, match=rf"bad\.jsonl, {message}"):
            read(JsonLines(path=tmp_path / "bad.jsonl"))

    def test_half_a_gzip_file_is_named(self, tmp_path):
        whole = gzip.compress(b'{"text": "some words"}\n' * 1000)
        for payload in (whole[: len(whole) // 2], b"not gzip at all", whole[:20] + b"\x00\x00\xff" + whole[23:]):
            (tmp_path / "a.jsonl.gz").write_bytes(payload)
            with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a whole gzip file"):
                read(JsonLines(path=tmp_path / "a.jsonl.gz"))

    def test_a_missing_path_is_named(self, tmp_path):
        with pytest.raises(UsageError, match="no file or folder"):
            read(JsonLines(path=tmp_path / "a.jsonl"))
        with pytest.raises(UsageError, match=r"no \.jsonl or \.ndjson file below"):
            read(JsonLines(path=tmp_path))


class TestParquet:
    @given(texts=st.lists(st.none() | st.text(max_size=20), max_size=40), rows=st.integers(1, 10))
    @settings(max_examples=20)
    def test_gives_every_text(self, tmp_path_factory, texts, rows):
        path = tmp_path_factory.mktemp("parquet") / "a.parquet"
        table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
        parquet.write_table(table, path, row_group_size=rows)
        assert read(Parquet(path=path)) == {f"a.parquet:{i}": text for i, text in enumerate(texts) if text}

    @pytest.mark.parametrize("groups", [1, 40])
    def test_streams(self, tmp_path, groups):
        """Memory is that of a few pages, however large the file or its row groups."""
        path = tmp_path / "a.parquet"
        draw = random.Random(0)
        texts = pyarrow.table({"text": [draw.randbytes(5000).hex() for _ in range(2000)]})
        parquet.write_table(texts, path, row_group_size=2000 // groups, write_batch_size=64)
        del texts
        before, peak, count = pyarrow.total_allocated_bytes(), 0, 0
        for _ in Parquet(path=path).documents():
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
            count += 1
        assert count == 2000
        assert peak < 8e6, "the file holds 20 MB of text"
        assert Parquet(path=path).size() == pytest.approx(20e6, rel=0.1)

    @pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
    def test_other_string_types_will_do(self, tmp_path, kind):
        table = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).cast(kind)})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert list(read(Parquet(path=tmp_path)).values()) == ["a", "b", "a"]

    @pytest.mark.parametrize(
        "kind",
        [
            pyarrow.int64(),
            pyarrow.binary(),
            pyarrow.list_(pyarrow.string()),
            pyarrow.dictionary(pyarrow.int32(), pyarrow.int64()),
        ],
    )
    def test_a_column_that_is_no_text_is_refused(self, tmp_path, kind):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([None, None], kind)}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"the column 'text' is of type .*, not string"):
            read(Parquet(path=tmp_path))

    def test_a_missing_column_is_named(self, tmp_path):
        parquet.write_table(pyarrow.table({"texts": ["a"], "id": [1]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet has no column 'text': did you mean 'texts'\?"):
            read(Parquet(path=tmp_path / "a.parquet"))

    def test_a_damaged_file_is_named(self, tmp_path):
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": [f"{i}" * 50 for i in range(5000)]}), path)
        payload = bytearray(path.read_bytes())
        path.write_bytes(payload[:-20])
        with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file"):
            read(Parquet(path=path))
        payload[20:2000] = bytes(1980)
        path.write_bytes(payload)
        with pytest.raises(PenstockError, match=r"a\.parquet"):
            read(Parquet(path=path))

    def test_a_missing_path_is_named(self, tmp_path):
        with pytest.raises(UsageError, match="no file or folder"):
            read(Parquet(path=tmp_path / "a.parquet"))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="has no option 'feild': did you mean 'field'"):
        create("data.corpus", "jsonl", path="a.jsonl", feild="x")
    with pytest.raises(ConfigError, match="needs 'path'"):
        create("data.corpus", "folder")
