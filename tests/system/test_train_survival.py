"""Training as processes that are stopped, killed, and run out of disk."""

from __future__ import annotations

import json
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import killed_runs
from penstock.core.metrics import read_metrics
from penstock.core.progress import silent
from penstock.parallel.world import World
from penstock.train import checkpoint
from penstock.train.run import Run
from penstock.train.session import stoppable, train_to_the_end
from tiny_runs import ENVIRONMENT, assert_same_bits, config, make_store, penstock, start, write_config


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory) -> Path:
    """The last checkpoint of 200 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert Run.create(config(store, steps=200), folder).trainer.train()
    return folder / "checkpoints" / "step-00000200"


def until(folder: Path, step: int) -> None:
    """Waits until a run has reported an update."""
    deadline = time.monotonic() + 60
    while not (records := read_metrics(folder / "metrics.jsonl")) or records[-1]["step"] < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_by_the_line_that_it_printed(store, straight, tmp_path, number):
    """With a blank in its name. Killed, it prints nothing, and the same line would do."""
    folder = tmp_path / "my run"
    process = start("train", write_config(tmp_path / "config.toml", store, steps=200), "--out", folder)
    until(folder, 25)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    found, faults = checkpoint.newest(folder / "checkpoints")
    assert faults == []
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        command = ["penstock", "train", "--resume", str(folder)]
    else:
        assert process.returncode == 0
        steps, line = re.fullmatch(r"stopped after (\d+) steps; continue with: (.*)\n", out).groups()
        assert checkpoint.step_of(found) == int(steps)
        command = shlex.split(line)
    assert 20 <= checkpoint.step_of(found) < 200
    assert command[:2] == ["penstock", "train"]
    done = penstock(*command[1:])
    assert done.returncode == 0, done.stderr
    assert "bits per byte on held-out documents after 200 steps" in done.stdout
    assert_same_bits(folder / "checkpoints" / "step-00000200", straight)
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [*range(1, 201)]
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("begun", [False, True])
def test_a_stop_outside_the_updates_says_what_to_do_too(tmp_path, capsys, number, begun):
    """While the store is built, while the compiler works, or in the evaluation."""
    if begun:
        (tmp_path / "run.json").write_text("{}")
    with stoppable(tmp_path, World()):
        signal.raise_signal(number)
        pytest.fail("the signal was not obeyed")
    wanted = (
        f"stopped; continue with: penstock train --resume {tmp_path}"
        if begun
        else "the run had not begun, and left nothing"
    )
    assert wanted in capsys.readouterr().out


def test_killed_at_any_instant_a_run_loses_no_more_than_an_interval(store, tmp_path):
    """Sixty times; each time there is a whole checkpoint, and the end is that of the run that nobody killed."""
    (tmp_path / "config.json").write_text(config(store, steps=450, checkpoint_steps=2).model_dump_json())
    done = subprocess.run(
        [sys.executable, killed_runs.__file__, tmp_path / "config.json", tmp_path / "run", "60"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deaths = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(deaths) == 60
    for death in deaths:
        assert death["faults"] == []
        assert death["reported"] - 2 <= death["saved"] <= death["reported"]
    alive = [death for death in deaths if death["killed"]]
    assert len(alive) >= 50
    assert len({death["saved"] for death in alive}) > 10
    straight = config(store, steps=450, checkpoint_steps=None)
    assert Run.create(straight, tmp_path / "straight").trainer.train()
    ends = [tmp_path / name / "checkpoints" / "step-00000450" for name in ("run", "straight")]
    assert_same_bits(*ends)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".partial", ".old"))]


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(store, tmp_path):
    """Files may grow to 200 kB: the weights fit, the optimizer's state does not."""
    folder = tmp_path / "run"
    assert train_to_the_end(Run.create(config(store, steps=10), folder), silent)
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "train", "--resume", folder, "--set", "steps=20"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: no checkpoint could be saved at step 20: " in done.stderr
    assert f"continue with: penstock train --resume {folder}\n" in done.stderr
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()} == before
    assert train_to_the_end(Run.reopen(folder), silent)["steps"] == 20
