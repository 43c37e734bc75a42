"""Imports in a thread."""

from __future__ import annotations

import sys
import threading

import pytest

from penstock.core.imports import importing


def test_modules_are_there_at_the_end_whatever_happens_meanwhile(tmp_path, monkeypatch):
    """They are imported while the block runs: here it ends once one of them says so."""
    monkeypatch.syspath_prepend(str(tmp_path))
    said = threading.Event()
    monkeypatch.setitem(sys.modules, "penstock_said", said)
    (tmp_path / "penstock_first.py").write_text("import sys\nsys.modules['penstock_said'].set()\n")
    (tmp_path / "penstock_second.py").write_text("there = True\n")
    with pytest.raises(KeyError), importing("penstock_first", "penstock_nowhere", "penstock_second"):
        assert said.wait(20)
        raise KeyError
    assert sys.modules["penstock_second"].there
