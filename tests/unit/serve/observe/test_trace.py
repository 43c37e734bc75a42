"""The trace as those who draw it read it: a stack of spans for each track."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.core.events import Event
from penstock.serve.messages import Snapshot
from penstock.serve.observe.trace import TAIL, Trace

SNAPSHOT = Snapshot(1, 2, 3, 16, 5, 8, 2, 0, 0, 0, 0, 0, 0, 0.1)
COURSE = [
    Event(10.0, "arrived", "cmpl-a/0", 0, {"tokens": 7, "waiting": 0}),
    Event(11.0, "admitted", "cmpl-a/0", 0, {"tokens": 7, "cached": 0}),
    Event(11.5, "first", "cmpl-a/0", 0, {}),
    Event(12.0, "arrived", "cmpl-b/0", 1, {"tokens": 3, "waiting": 0}),
    Event(13.0, "preempted", "cmpl-a/0", 0, {"by": "cmpl-b/0", "by_index": 1, "missing": 1, "computed": 9}),
    Event(13.5, "admitted", "cmpl-b/0", 1, {"tokens": 3, "cached": 0}),
    Event(15.0, "admitted", "cmpl-a/0", 0, {"tokens": 9, "cached": 0}),
    Event(15.5, "settled", "cmpl-a/0", 0, {"drafted": 4, "accepted": 2}),
    Event(16.0, "finished", "cmpl-a/0", 0, {"reason": "stop", "generated": 5}),
]


def drawn(path: Path) -> tuple[dict[str, list], list[str], dict[str, list]]:
    """For each track its spans (name, begin, end), the marks in order, and the curves."""
    text = path.read_text()
    events = json.loads(text if text.endswith("]\n") else text + "]")
    names = {e["tid"]: e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    spans: dict[str, list] = {name: [] for name in names.values()}
    open_: dict[int, list] = {}
    for each in events:
        if each["ph"] == "B":
            open_.setdefault(each["tid"], []).append((each["name"], each["ts"]))
        elif each["ph"] == "E":
            spans[names[each["tid"]]].append((*open_[each["tid"]].pop(), each["ts"]))
    assert all(len(stack) <= 1 for stack in open_.values())
    for track, stack in open_.items():
        spans[names[track]] += [(*span, None) for span in stack]
    curves: dict[str, list] = {}
    for each in events:
        if each["ph"] == "C":
            curves.setdefault(each["name"], []).append(each["args"])
    return spans, [each["name"] for each in events if each["ph"] == "i"], curves


def test_spans_marks_and_curves(tmp_path):
    with Trace(tmp_path / "t.json") as trace:
        for event in COURSE:
            trace.see([event], SNAPSHOT)
        killed = tmp_path / "killed.json"
        killed.write_bytes((tmp_path / "t.json").read_bytes())
    for path in (tmp_path / "t.json", killed):
        spans, marks, curves = drawn(path)
        assert spans == {
            "cmpl-a/0": [
                ("waiting", 10_000_000, 11_000_000),
                ("running", 11_000_000, 13_000_000),
                ("preempted", 13_000_000, 15_000_000),
                ("running", 15_000_000, 16_000_000),
            ],
            "cmpl-b/0 (continuation 1)": [("waiting", 12_000_000, 13_500_000), ("running", 13_500_000, None)],
        }
        assert marks == ["first", "preempted", "settled", "finished"]
        assert curves["sequences"] == [{"running": 2, "waiting": 3}] * len(COURSE)
        assert curves["blocks held"] == [{"held": 5}] * len(COURSE)


def test_one_that_came_before_the_trace_is_left_out(tmp_path):
    with Trace(tmp_path / "t.json") as trace:
        trace.see(COURSE[1:3], None)
    assert drawn(tmp_path / "t.json") == ({}, [], {})


def test_a_full_trace_ends_and_says_so(tmp_path, caplog):
    path, most = tmp_path / "t.json", TAIL + 6000
    with Trace(path, most) as trace:
        for _ in range(50):
            trace.see(COURSE, SNAPSHOT)
    assert path.stat().st_size <= most
    spans, marks, _ = drawn(path)
    assert spans["cmpl-a/0"][0] == ("waiting", 10_000_000, 11_000_000)
    assert marks[-1] == "the trace is full"
    assert [record.message for record in caplog.records] == [
        f"the trace {path} is full and ends here; the server goes on"
    ]


def test_a_full_disk_ends_the_trace_at_a_whole_event(tmp_path, caplog, monkeypatch):
    path = tmp_path / "t.json"
    with Trace(path) as trace:
        trace.see(COURSE[:3], SNAPSHOT)
        file, size = trace._file, path.stat().st_size

        class Half:
            """Takes half of what is written, as a disk does that is nearly full."""

            closed = property(lambda self: file.closed)
            tell, truncate, close = file.tell, file.truncate, file.close

            def write(self, text: bytes) -> int:
                return file.write(text[: len(text) // 2])

        monkeypatch.setattr(trace, "_file", Half())
        trace.see(COURSE[3:], SNAPSHOT)
        trace.see(COURSE, SNAPSHOT)
    assert path.stat().st_size == size
    assert drawn(path)[1] == ["first"]
    assert "the server goes on: the disk is full" in caplog.text


@pytest.mark.parametrize("path", ["/dev/full", "missing/t.json", "."])
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, path):
    with pytest.raises(PenstockError, match="cannot write the trace"):
        Trace(tmp_path / path)
