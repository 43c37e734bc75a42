"""Measuring side by side: turns, medians, spread, and what is recorded beside the figures."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core import bench as bench_module
from penstock.core.bench import Apart, Bench, LateError, commit, load, scripts, summary, versions
from penstock.core.devices import label
from penstock.core.errors import ConfigError, PenstockError, UsageError
from penstock.core.results import Result, cells

CPU = torch.device("cpu")
NAMES = {"subject": "ours", "setting": "small", "metric": "throughput", "unit": "items/s"}


def replay(values, log=None, name=""):
    """A subject that gives the warm-up's figure, which must not count, and then ``values``."""
    figures = iter([1e9, *values])

    def run() -> float:
        if log is not None:
            log.append(name)
        return next(figures)

    return run


@pytest.fixture(autouse=True, scope="module")
def results(tmp_path_factory):
    """Where results go, instead of the source tree."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "results_folder", lambda: folder)
        yield folder


@pytest.fixture
def run():
    return Bench("made", CPU)


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=1, max_size=9))
def test_medians_ranges_and_the_ratio_over_pairs(pairs):
    ours, theirs = zip(*pairs, strict=True)
    row = Bench("made", CPU).compare(
        **NAMES, peer="theirs", run=replay(ours), peer_run=replay(theirs), repetitions=len(pairs)
    )
    ratios = [a / b for a, b in pairs]
    assert (row.value, row.low, row.high) == (statistics.median(ours), min(ours), max(ours))
    assert (row.peer_value, row.peer_low, row.peer_high) == (statistics.median(theirs), min(theirs), max(theirs))
    assert (row.ratio, row.ratio_low, row.ratio_high) == (statistics.median(ratios), min(ratios), max(ratios))
    assert row.repetitions == len(pairs)


def test_subject_and_peer_take_turns(run):
    log: list[str] = []
    run.compare(
        **NAMES, peer="theirs", run=replay([1] * 3, log, "A"), peer_run=replay([1] * 3, log, "B"), repetitions=3
    )
    assert "".join(log) == "AB" * 4


def test_drift_of_the_machine_falls_on_both_alike(run):
    """Both slow down by half on the way, and the ratio still says twice as fast."""
    speeds = [100, 90, 80, 70, 60, 50]
    row = run.compare(
        **NAMES,
        peer="theirs",
        run=replay([2 * speed for speed in speeds]),
        peer_run=replay(speeds),
        repetitions=len(speeds),
    )
    assert row.ratio == row.ratio_low == row.ratio_high == 2


def test_one_subject_alone(run):
    row = run.measure(**NAMES, run=replay([3, 1, 2]), repetitions=3, better="lower")
    assert (row.value, row.low, row.high, row.repetitions, row.peer, row.ratio) == (2, 1, 3, 3, None, None)


def test_one_run_may_give_several_figures(run):
    """Each takes its turn; rows are made of what the same turns gave."""
    log: list[str] = []
    figures = {"A": iter([(9, 9), (6, 1), (8, 2)]), "B": iter([(9, 9), (3, 2), (2, 4)])}

    def turn(name: str) -> tuple[int, int]:
        log.append(name)
        return next(figures[name])

    found = run.turns({name: lambda name=name: turn(name) for name in figures}, "small", 2)
    assert ("".join(log), found) == ("ABABAB", {"A": [(6, 1), (8, 2)], "B": [(3, 2), (2, 4)]})
    fast, small = (
        run.compared(
            **NAMES, peer="theirs", values=[f[part] for f in found["A"]], peer_values=[f[part] for f in found["B"]],
            papers=papers,
        )
        for part, papers in ((0, [3]), (1, ()))
    )  # fmt: skip
    assert (fast.value, fast.peer_value, fast.ratio, fast.repetitions, fast.papers) == (7, 2.5, 3, 2, (3,))
    assert (small.ratio_low, small.ratio_high, small.papers) == (0.5, 0.5, ())


def test_a_quick_run_repeats_less():
    quick = Bench("made", CPU, quick=True)
    assert quick.measure(**NAMES, run=itertools.count().__next__, repetitions=50).repetitions == 2
    assert quick.result().quick


def test_a_peer_that_measures_nothing_is_an_error(run):
    with pytest.raises(PenstockError, match=r"'made' measured a throughput of zero for 'theirs' \(small\)"):
        run.compare(**NAMES, peer="theirs", run=replay([1]), peer_run=replay([0]), repetitions=1)


def test_a_wrong_row_is_named(run):
    with pytest.raises(ConfigError, match=r"(?s)a row of the benchmark 'made': not valid.*vlaue: unknown key"):
        run.row(**NAMES, vlaue=3)
    with pytest.raises(ConfigError, match="finite"):
        run.measure(**NAMES, run=lambda: float("nan"), repetitions=1)


def test_seconds_are_what_the_clock_says_between_start_and_end(run, monkeypatch):
    now = 5.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def work():
        nonlocal now
        now += 2.5

    assert run.seconds(work) == 2.5


def test_the_result_is_written_and_read_back(run, results, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    run.measure(**NAMES, run=lambda: 1234.0)
    result = run.finish()
    path = results / f"made-{label(CPU)}.json"
    assert Result.model_validate(json.loads(path.read_text())) == result
    shown = capsys.readouterr().out
    assert "throughput" in shown
    assert "1,234" in shown


def test_a_quick_run_is_written_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "results_folder", lambda: tmp_path / "results")
    quick = Bench("made", CPU, quick=True)
    quick.row(**NAMES, value=3)
    quick.finish()
    assert not (tmp_path / "results").exists()
    assert "quick: not a measurement" in " ".join(capsys.readouterr().out.split())
    quick = Bench("made", CPU, quick=True, out=tmp_path / "mine.json")
    quick.row(**NAMES, value=3)
    quick.finish()
    assert json.loads((tmp_path / "mine.json").read_text())["quick"] is True


def test_a_run_that_is_cut_off_leaves_its_rows(tmp_path):
    """Beside what an earlier run has left, which stays as it was until the run is complete."""
    path = tmp_path / "mine.json"
    path.write_text("earlier")
    cut_off = Bench("made", CPU, out=path)
    for value in (3.0, 4.0):
        cut_off.row(**NAMES, value=value)
    left = Result.model_validate(json.loads((tmp_path / "mine.json.partial").read_text()))
    assert [row.value for row in left.rows] == [3, 4]
    assert path.read_text() == "earlier"
    assert cut_off.finish().rows == left.rows
    assert [found.name for found in tmp_path.iterdir()] == ["mine.json"]


def test_a_benchmark_without_rows_measured_nothing(tmp_path):
    with pytest.raises(PenstockError, match="'made' measured nothing"):
        Bench("made", CPU, out=tmp_path / "mine.json").finish()
    assert not list(tmp_path.iterdir())


def test_versions_are_those_of_what_runs(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.8.7+cu130")  # the metadata of such a build may say 9.8.7
    found = versions()
    assert found["torch"] == "9.8.7+cu130"
    assert found["python"].startswith("3.")
    assert "vllm" not in found or found["vllm"]


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_and_whether_the_tree_has_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("PENSTOCK_COMMIT", raising=False)
    monkeypatch.setattr(bench_module, "repository", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "unknown"
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert len(commit()) >= 7
    assert head.startswith(commit())
    (tmp_path / "untracked").write_text("b")
    assert head.startswith(commit())
    (tmp_path / "file").write_text("c")
    assert commit().endswith("-dirty")
    assert head.startswith(commit().removesuffix("-dirty"))
    monkeypatch.setenv("PENSTOCK_COMMIT", "1234567")
    assert commit() == "1234567"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree with two benchmarks."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "train.py").write_text(
        '"""Training.\n\nMore."""\n\ndef main(bench):\n    bench.row(subject="s", setting="", '
        'metric="m", unit="", value=2 if bench.quick else 3)\n'
    )
    (tmp_path / "bench" / "empty.py").write_text('raise_on_import = None\n"""no docstring"""\n')
    monkeypatch.setattr(bench_module, "repository", lambda: tmp_path)
    return tmp_path


def test_scripts_are_found_described_and_loaded(tree, run):
    assert scripts() == {name: tree / "bench" / f"{name}.py" for name in ("empty", "train")}
    assert [summary(path) for path in scripts().values()] == ["", "Training."]
    script = load("train")
    script.main(run)
    assert run.rows[0].value == 3


def test_a_wrong_name_is_answered_with_the_nearest_or_all(tree):
    with pytest.raises(UsageError, match="there is no benchmark 'trian': did you mean 'train'"):
        load("trian")
    with pytest.raises(UsageError, match="there is no benchmark 'xyz': known: empty, train"):
        load("xyz")
    with pytest.raises(UsageError, match=r"empty\.py has no function main\(bench\)"):
        load("empty")


def test_without_a_source_tree_there_are_no_benchmarks(monkeypatch):
    monkeypatch.setattr(bench_module, "repository", lambda: None)
    with pytest.raises(UsageError, match=r"this installation has none\nClone the repository"):
        load("train")


def test_a_process_apart_answers_as_often_as_it_is_asked_and_says_why_it_ended():
    script = (
        "import json, sys\n"
        "total = 0\n"
        "for line in sys.stdin:\n"
        "    total += 1 / json.loads(line)['share']\n"
        "    print(json.dumps({'total': total}), flush=True)\n"
    )
    with Apart([sys.executable, "-c", script], "the peer") as peer:
        assert [peer.ask({"share": share})["total"] for share in (0.5, 0.25)] == [2, 6]
        for _ in range(2):
            with pytest.raises(PenstockError, match="the peer failed: ZeroDivisionError"):
                peer.ask({"share": 0})


def test_a_process_apart_that_takes_longer_than_it_is_given_is_late():
    script = (
        "import sys\nfor line in sys.stdin:\n    'wait' in line and sys.stdin.readline()\n    print('{}', flush=True)\n"
    )
    with Apart([sys.executable, "-c", script], "the peer") as peer:
        assert peer.ask({}, within=600) == {}
        with pytest.raises(LateError, match=r"the peer did not answer in 0 s"):
            peer.ask({"wait": True}, within=0.01)


def state(process: Path) -> str:
    """The letter that Linux has for what a process does; Z also for one that is gone."""
    try:
        return process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def wait_until(process: Path, states: str) -> None:
    deadline = time.monotonic() + 60
    while state(process) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(process) in states


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_process_apart_has_started_stands_still_until_it_is_asked_again():
    script = (
        "import json, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'child': child.pid}), flush=True)\n"
        "sys.stdin.readline()\n"
        "stat = open('/proc/' + str(child.pid) + '/stat').read()\n"
        "print(json.dumps({'state': stat.rsplit(')', 1)[1].split()[0]}), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with Apart([sys.executable, "-c", script], "the peer") as peer:
        child = Path(f"/proc/{peer.ask({})['child']}")
        wait_until(child, "T")
        assert peer.ask({})["state"] in "RS"
        wait_until(child, "T")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("ended", [False, True])
def test_a_process_apart_leaves_none_that_it_has_started(ended):
    script = (
        "import json, subprocess, sys\n"
        "sys.stdin.readline()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'child': child.pid}), flush=True)\n"
        f"{'' if ended else 'sys.stdin.readline()'}\n"
    )
    with Apart([sys.executable, "-c", script], "the peer") as peer:
        child = Path(f"/proc/{peer.ask({})['child']}")
        assert state(child) != "Z"
    wait_until(child, "Z")


def test_a_note_stands_beside_the_setting(run):
    row = run.row(**NAMES, value=1.0, note="half of it was idle")
    assert cells(row)[1] == "small (half of it was idle)"
    assert "note" not in run.row(**NAMES, value=1.0).model_dump(exclude_none=True)
