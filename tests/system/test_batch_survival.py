"""``penstock batch`` as processes that are killed and stopped."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

import killed_batches
from programs import penstock, start


def write_lines(path: Path, count: int, max_tokens: int) -> None:
    lines = []
    for number in range(count):
        body = {"prompt": f"def f{number % 7}(a, b):\n", "max_tokens": max_tokens, "temperature": 0.8}
        record = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
        lines.append("{broken\n" if number % 30 == 29 else json.dumps(record) + "\n")
    path.write_text("".join(lines))


def texts(path: Path) -> dict[str, str]:
    """The text of every line by its id; every line is there once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {
        record["id"]: (record["error"] and "error") or record["response"]["body"]["choices"][0]["text"]
        for record in records
    }
    assert len(found) == len(records), "a line is answered twice"
    return found


@pytest.mark.parametrize(("deaths", "lines"), [(4, 60), pytest.param(12, 200, marks=pytest.mark.slow)])
def test_killed_at_any_instant_no_finished_line_is_lost_or_repeated(tmp_path, deaths, lines):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, lines, max_tokens=12)
    llm = killed_batches.engine()
    counts = killed_batches.kill(llm, source, target, deaths)
    assert counts == sorted(counts)
    assert counts[-1] < lines, "the last life had nothing left to do"
    found = texts(target)
    assert set(found) == {f"batch_req_{number}" for number in range(lines)}
    killed_batches.live(llm, source, tmp_path / "straight.jsonl")
    assert found == texts(tmp_path / "straight.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_command_goes_on_where_it_was(tmp_path, number):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, 24, max_tokens=16)
    command = ["batch", "python-1m", source, target, "--device", "cpu", "--set", "sequences=2"]
    process = start(*command)
    deadline = time.monotonic() + 120
    while not target.exists() or target.stat().st_size == 0:
        assert time.monotonic() < deadline, process.errors()
        time.sleep(0.01)
    process.send_signal(number)
    stopped = process.completed()
    assert "Traceback" not in stopped.stderr
    if number == signal.SIGINT:
        assert stopped.returncode == 130
        assert "run the same command to go on" in stopped.stdout
    kept = target.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1] if b"\n" in kept else b""
    done = penstock(*command)
    assert done.returncode == 0, done.stderr
    assert "lines" in done.stdout
    assert target.read_bytes().startswith(kept)
    assert len(texts(target)) == 24
