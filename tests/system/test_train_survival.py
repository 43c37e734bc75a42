"""Training as processes that are stopped, killed, and run out of disk."""

from __future__ import annotations

import re
import resource
import shlex
import signal
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
from programs import Program, penstock, run_penstock, start
from tiny_runs import assert_same_bits, config, make_store, write_config

STEPS = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert Run.create(config(store, steps=STEPS, checkpoint_steps=None), folder).trainer.train()
    return folder


def until(folder: Path, step: int) -> None:
    """Waits until a run has reported an update."""
    deadline = time.monotonic() + 120
    while not (records := read_metrics(folder / "metrics.jsonl")) or records[-1]["step"] < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)


def last(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08}"


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL))],
)
def test_a_run_that_is_stopped_goes_on_by_the_line_that_it_printed(store, straight, tmp_path, number):
    """With a blank in its name. Killed, it prints nothing, and the same line would do."""
    folder = tmp_path / "my run"
    process = start("train", write_config(tmp_path / "config.toml", store, steps=STEPS), "--out", folder)
    until(folder, 12)
    process.send_signal(number)
    stopped = process.completed()
    assert "Traceback" not in stopped.stderr
    found, faults = checkpoint.newest(folder / "checkpoints")
    assert faults == []
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
        command = ["penstock", "train", "--resume", str(folder)]
    else:
        assert stopped.returncode == 0
        steps, line = re.fullmatch(r"stopped after (\d+) steps; continue with: (.*)\n", stopped.stdout).groups()
        assert checkpoint.step_of(found) == int(steps)
        command = shlex.split(line)
    assert 10 <= checkpoint.step_of(found) < STEPS
    assert command[:2] == ["penstock", "train"]
    done = penstock(*command[1:])
    assert done.returncode == 0, done.stderr
    assert f"bits per byte on held-out documents after {STEPS} steps" in done.stdout
    assert_same_bits(last(folder, STEPS), last(straight, STEPS))
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [*range(1, STEPS + 1)]
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


@pytest.mark.parametrize("deaths", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_any_instant_a_run_loses_no_more_than_an_interval(store, tmp_path, deaths):
    """Each time there is a whole checkpoint, and the end is that of the run that nobody killed, however much longer."""
    steps = STEPS * deaths // 12
    told = killed_runs.kill(config(store, steps=steps, checkpoint_steps=2), tmp_path / "run", deaths)
    for death in told:
        assert death.faults == []
        assert death.reported - 2 <= death.saved <= death.reported
    alive = [death for death in told if death.killed]
    assert len(alive) >= deaths * 5 / 6
    assert len({death.saved for death in alive}) > deaths / 6
    straight = tmp_path / "straight"
    assert Run.create(config(store, steps=steps, checkpoint_steps=None), straight).trainer.train()
    assert_same_bits(last(tmp_path / "run", steps), last(straight, steps))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".partial", ".old"))]


def short_of_disk(*arguments: str) -> None:
    """``penstock`` where files may grow to 200 kB: the weights fit, the optimizer's state does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    run_penstock(*arguments)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(store, tmp_path):
    folder = tmp_path / "run"
    assert train_to_the_end(Run.create(config(store, steps=10), folder), silent)
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    done = Program(short_of_disk, "train", "--resume", str(folder), "--set", "steps=20").completed()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: no checkpoint could be saved at step 20: " in done.stderr
    assert f"continue with: penstock train --resume {folder}\n" in done.stderr
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()} == before
    assert train_to_the_end(Run.reopen(folder), silent)["steps"] == 20
