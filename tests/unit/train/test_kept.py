"""A run that is kept is trained once for the same settings and data."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.models import hub
from penstock.train.kept import kept_run


def test_what_is_kept_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(40):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    corpus = f"data.corpus={{name='folder', path='{tmp_path}', patterns=['*.py']}}"
    small = ["device=cpu", "steps=1", corpus, "data.vocabulary=300", "batch.tokens=128", "batch.stages=[{length=64}]"]
    first = kept_run("python-1m", small, b"a")
    assert hub.load(first).config.vocabulary == 300
    (first / "mark").touch()
    assert (kept_run("python-1m", small, b"a") / "mark").exists()
    assert not (kept_run("python-1m", small, b"b") / "mark").exists()
