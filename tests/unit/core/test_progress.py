from __future__ import annotations

import io

import pytest
from rich.console import Console

from penstock.core import progress
from penstock.core.progress import Lines, duration, quantity, show, silent


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1 kB"),
        (12_118_641, "B", "12.1 MB"),
        (5800, "tok", "5.8 ktok"),
        (3.2e9, "tok", "3.2 Gtok"),
        (4e15, "FLOP", "4e+03 TFLOP"),
        (0, "line", "0 lines"),
        (1, "line", "1 line"),
        (0.02512, "model", "0.0251 models"),
        (999, "line", "999 lines"),
        (12_345.4, "line", "12,345 lines"),
    ],
)
def test_quantities(value, unit, written):
    assert quantity(value, unit) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, written):
    assert duration(seconds) == written


def test_lines_come_at_intervals_with_rate_and_time_left():
    now = 0.0
    stream = io.StringIO()
    lines = Lines("training", 1000, "step", stream=stream, every=10, clock=lambda: now)
    for _ in range(25):
        now += 1.0
        lines.advance(20, note=f"loss {now:.1f}")
    lines.advance(499)
    lines.finish()
    assert stream.getvalue().splitlines() == [
        "training: 200 steps of 1,000 steps (20%), 20 steps/s, 40 s left, loss 10.0",
        "training: 400 steps of 1,000 steps (40%), 20 steps/s, 30 s left, loss 20.0",
        "training: 999 steps of 1,000 steps (100%), 40 steps/s, loss 25.0",
    ]


def test_lines_without_a_total():
    now = 0.0
    stream = io.StringIO()
    lines = Lines("reading", None, "B", stream=stream, clock=lambda: now)
    now = 20.0
    lines.advance(4e6)
    assert stream.getvalue() == "reading: 4 MB, 200 kB/s\n"


def test_show_prints_lines_where_there_is_no_terminal(capsys):
    with show("reading", 10, "B") as bar:
        bar.advance(10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("reading: 10 B of 10 B (100%), ")
    with pytest.raises(KeyError), show("reading", 10, "B"):
        raise KeyError
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("total", [2000, None])
def test_show_draws_a_bar_on_a_terminal(monkeypatch, total):
    drawn = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=drawn, force_terminal=True, width=100, color_system=None)
    )
    with show("training", total, "tok") as bar:
        bar.advance(500, note="loss 2.31")
        bar.advance(1500)
    last = drawn.getvalue().split("training")[-1]
    assert "2 ktok" in last
    assert "loss 2.31" in last, "a note stays until the next"


def test_silent_is_silent(capsys):
    with silent("reading", 10, "B") as bar:
        bar.advance(10, note="note")
    assert capsys.readouterr() == ("", "")
