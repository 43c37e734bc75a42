"""Measured choices: made once, and the same at each start after that."""

from __future__ import annotations

import json

import pytest
import torch

from penstock.core.choices import chosen, circumstances


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "penstock" / "choices"


def test_a_choice_is_measured_once(folder):
    found = iter([55, 23, 7])
    assert [chosen("graphs", {"rows": (1, 2)}, lambda: next(found)) for _ in range(3)] == [55] * 3
    assert chosen("graphs", {"rows": (1, 3)}, lambda: next(found)) == 23
    assert chosen("others", {"rows": (1, 2)}, lambda: next(found)) == 7


def test_what_decides_is_kept_for_people_to_read(folder):
    chosen("graphs", {"device": "a", "rows": [1, 2]}, lambda: 3)
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"about": {"device": "a", "rows": [1, 2]}, "choice": 3}


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"about": {"rows": 9}, "choice": 3}', '{"about": {}, "choice": "x"}']
)
def test_a_damaged_file_is_measured_anew(folder, damage):
    chosen("graphs", {}, lambda: 1)
    (file,) = folder.iterdir()
    file.write_text(damage)
    assert [chosen("graphs", {}, lambda: 2), chosen("graphs", {}, lambda: 3)] == [2, 2]


def test_where_nothing_can_be_kept_each_start_measures_and_says_so(folder, caplog):
    folder.parent.write_text("a file where a folder should be")
    found = iter([1, 2])
    assert [chosen("graphs", {}, lambda: next(found)) for _ in range(2)] == [1, 2]
    assert "measured at each start" in caplog.text


def test_a_measurement_that_fails_is_not_repeated(folder):
    calls = []

    def failing() -> int:
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        chosen("graphs", {}, failing)
    assert len(calls) == 1 and not list(folder.glob("*"))


def test_circumstances_are_json_and_name_the_packages():
    found = circumstances(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] and found["processor"]
