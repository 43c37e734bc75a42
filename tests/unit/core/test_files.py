"""Atomic writing: whatever happens to the writer, a reader sees the old contents or the new."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from durability import durable
from penstock.core import files
from penstock.core.errors import PenstockError


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old_folder(tmp_path):
    """A folder that is about to be replaced."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "part").write_text("old")
    return folder


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "new" / "file"
    files.write_atomic(path, "first")
    files.write_atomic(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after_it(tmp_path):
    path = tmp_path / "file"
    for text in ("first", "second"):
        with durable() as placed:
            files.write_atomic(path, text)
        assert placed == [path]


def test_a_folder_is_synced_before_it_is_renamed_and_the_one_around_it_after_that(old_folder):
    """With all that is in it; also where it takes another's place."""
    for target in (old_folder, old_folder.parent / "other"):
        with durable() as placed, files.atomic_folder(target) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "part").write_text("new")
            (folder / "part").write_text("new")
        assert placed == [target]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(PenstockError, match=r"cannot write .*file: No space left[^\n]*\nThe disk is full"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole(tmp_path):
    with files.atomic_folder(tmp_path / "a" / "target") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "part").write_text("new")
        assert not (tmp_path / "a" / "target").exists()
    assert (tmp_path / "a" / "target" / "deep" / "part").read_text() == "new"
    assert names(tmp_path / "a") == ["target"]


def test_a_folder_is_replaced(old_folder):
    with files.atomic_folder(old_folder) as folder:
        (folder / "other").write_text("new")
        assert (old_folder / "part").read_text() == "old"
    assert names(old_folder) == ["other"]
    assert names(old_folder.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_inside_leaves_the_old_folder(old_folder, error):
    with pytest.raises(error), files.atomic_folder(old_folder) as folder:
        (folder / "part").write_text("half")
        raise error
    assert (old_folder / "part").read_text() == "old"
    assert names(old_folder.parent) == ["target"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_folder(old_folder, monkeypatch, call):
    real = getattr(os, call)

    def fails(first, *rest):
        # Setting the old folder aside succeeds, so that the rename after it is the one that fails.
        return real(first, *rest) if call == "rename" and "partial" not in str(first) else disk_full()

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(PenstockError, match="The disk is full"), files.atomic_folder(old_folder) as folder:
        (folder / "part").write_text("new")
    assert (old_folder / "part").read_text() == "old"
    assert names(old_folder.parent) == ["target"]


WRITER = """
import itertools, pathlib, sys
from penstock.core.files import atomic_folder, write_atomic
target = pathlib.Path(sys.argv[1])
for number in itertools.count():
    write_atomic(target / "file", str(number % 10) * 100_000)
    with atomic_folder(target / "folder") as folder:
        (folder / "a").write_text(str(number))
        (folder / "b").write_text(str(number))
    print(number, flush=True)
"""


def test_kill_at_any_instant_leaves_whole_files(tmp_path):
    def whole(folder: Path) -> bool:
        # What an earlier kill left of a folder that was being removed may be there as well: it is not whole.
        there = all((folder / name).exists() for name in "ab")
        return there and (folder / "a").read_text() == (folder / "b").read_text() != ""

    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.0013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        text = (tmp_path / "file").read_text()
        assert text == text[0] * 100_000
        folder = tmp_path / "folder"
        assert whole(folder) if folder.exists() else any(map(whole, tmp_path.glob(".folder.*.old")))


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EACCES, "permissions"), (errno.EROFS, "permissions"), (errno.EIO, "")]
)
def test_an_operating_system_error_says_what_was_being_done(number, hint):
    with pytest.raises(PenstockError) as caught, files.explain_os_errors("cannot write the model"):
        raise OSError(number, os.strerror(number), "/models/x")
    assert str(caught.value).startswith(f"cannot write the model: {os.strerror(number)} (/models/x)")
    assert hint in caught.value.hint
    assert bool(hint) == bool(caught.value.hint)


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "ü": "é"}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == json.loads((tmp_path / "x.json").read_text()) == value


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "does not exist"),
        ("broken.json", b"{", r"broken\.json is not valid JSON"),
        ("binary.json", b"\xff", r"binary\.json is not valid JSON"),
        (".", None, "cannot read .*: Is a directory"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PenstockError, match=message):
        files.read_json(tmp_path / name)


def test_checksum(tmp_path):
    path = Path(tmp_path / "data")
    path.write_bytes(bytes(range(256)) * 5000)
    assert files.checksum(path) == hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()
