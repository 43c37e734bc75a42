"""``penstock search`` as processes that are killed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import killed_searches
from penstock.core.progress import silent
from penstock.ops.paged.invariant import Invariant
from penstock.search.llm import LLM, Plan
from penstock.search.programs.beam import Beam
from penstock.serve.choose.sampling import SamplingParams
from programs import penstock, start


def write_problems(path: Path, count: int) -> None:
    problems = ({"id": f"p{number}", "prompt": f"def f{number}(a, b):\n"} for number in range(count))
    path.write_text("".join(json.dumps(each) + "\n" for each in problems))


def records(path: Path) -> dict[int, dict[str, Any]]:
    """The results by the problem's place; each is there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["place"]: line for line in lines}
    assert len(found) == len(lines), "a problem is searched twice"
    return found


def test_killed_at_any_instant_no_finished_problem_is_lost_or_repeated(tmp_path):
    """And what is found is what a search finds that nobody killed."""
    torch.set_num_threads(1)
    same = Invariant().serves(torch.device("cpu"), torch.float32, 16) is None
    llm = LLM("python-1m", device="cpu", sequences=4, cache_tokens=2048, deterministic=same, progress=silent)
    shortest = lambda problem, candidates: [-float(len(each.text)) for each in candidates]  # noqa: E731
    plan = Plan(Beam(width=2, expand=2).run, {"": shortest}, SamplingParams(max_tokens=12, seed=5), step="\n")
    source, folder = tmp_path / "problems.jsonl", tmp_path / "found"
    write_problems(source, 16)
    kept = killed_searches.kill(llm, plan, source, folder, deaths=2)
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert all(lines[: len(each)] == each for each in kept), "what was finished has changed"
    assert 0 < len(kept[-1]) < 16, "the last life had nothing left to do"
    found = records(folder / "results.jsonl")
    assert sorted(found) == list(range(16))
    killed_searches.live(llm, plan, source, tmp_path / "straight")
    straight = records(tmp_path / "straight" / "results.jsonl")
    assert {place: (each["text"], each["tree"]) for place, each in found.items()} == {
        place: (each["text"], each["tree"]) for place, each in straight.items()
    }


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(tmp_path):
    source, folder = tmp_path / "problems.jsonl", tmp_path / "found"
    write_problems(source, 30)
    command = ["search", "python-1m", source, "--program", "majority", "--out", folder, "--max-tokens", "24"]
    command += ["--device", "cpu", "--set", "sequences=8"]
    process, target = start(*command), folder / "results.jsonl"
    deadline = time.monotonic() + 120
    while not target.exists() or target.stat().st_size == 0:
        assert time.monotonic() < deadline, process.errors()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.completed()
    kept = target.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    done = penstock(*command)
    assert done.returncode == 0, done.stderr
    assert "problems were done before" in done.stderr
    assert target.read_bytes().startswith(kept)
    assert sorted(records(target)) == list(range(30))
