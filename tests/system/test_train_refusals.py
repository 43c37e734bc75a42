"""Bad input to ``penstock train`` and ``penstock demo``: one message, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from penstock import cli
from penstock.core.errors import PenstockError
from penstock.core.progress import silent
from penstock.train import checkpoint
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from programs import penstock
from tiny_runs import MODEL, VOCABULARY, config, make_store, tensors, write_config


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train_to_the_end(Run.create(config(store, steps=4, checkpoint_steps=2), folder), silent)
    return folder


@pytest.fixture
def folder(tmp_path, store, finished, monkeypatch) -> Path:
    """A working directory with a store, a finished run and some input that is wrong."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store, "store")
    shutil.copytree(finished, "finished")
    write_config(Path("good.toml"), Path("store"))
    Path("broken.toml").write_text("steps = [1,")
    Path("binary.toml").write_bytes(b"\xff\xfe")
    Path("empty").mkdir()
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"\x89PNG\xff")
    Path("damaged").mkdir()
    for step in (2, 4):
        shutil.copytree(f"finished/checkpoints/step-0000000{step}", f"damaged/checkpoints/step-0000000{step}")
        Path(f"damaged/checkpoints/step-0000000{step}/model.safetensors").write_bytes(b"")
    shutil.copy("finished/run.json", "damaged/run.json")
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process: its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penstock", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, errors = capsys.readouterr()
        return exit.value.code or 0, out, errors

    return run


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


OWN = ["--set", "data={corpus={name='folder',path='PATH'},vocabulary=300}", "--set", "model.vocabulary=300"]
USAGE = {
    "nothing to train": ([], "say what to train: one of a configuration file, --preset, --resume or --branch"),
    "two things to train": (["good.toml", "--preset", "demo"], "say what to train"),
    "a run of its own for --resume": (["--resume", "finished", "--out", "x"], "--out names the folder of a new run"),
    "a configuration of a resumed run": (["--resume", "finished", "--show-config"], "--show-config goes with"),
    "no such file": (["none.toml"], "there is no file none.toml"),
    "a folder as configuration": (["empty"], "cannot read empty: Is a directory"),
    "no TOML": (["broken.toml"], "broken.toml is not valid TOML"),
    "no text": (["binary.toml"], "binary.toml is not valid TOML"),
    "no such preset": (["--preset", "dmeo"], "there is no preset 'dmeo': did you mean 'demo'?"),
    "unknown key": (["good.toml", "--set", "optim.rl=1"], "has no option 'rl'"),
    "unknown section": (["good.toml", "--set", "modle.hidden=1"], "modle: unknown key; did you mean 'model'"),
    "malformed override": (["good.toml", "--set", "steps"], "cannot read the override 'steps'"),
    "a word for a number": (["good.toml", "--set", "steps=many"], "steps: Input should be a valid integer"),
    "impossible batch": (["good.toml", "--set", "batch.tokens=100"], "tokens (100) must be a multiple of"),
    "impossible stages": (["good.toml", "--set", "batch.stages=[{length=48},{length=32}]"], "must be a multiple of"),
    "rows beyond the context": (
        ["good.toml", "--set", "batch.stages=[{length=128}]"],
        "longer than the model's context",
    ),
    "no time": (["good.toml", "--set", "minutes=0"], "minutes: Input should be greater than 0"),
    "no GPU": (["good.toml", "--set", "device=cuda:9"], "CUDA device"),
    "no such device": (["good.toml", "--set", "device=tpu"], "there is no device called 'tpu'"),
    "vocabulary too large": (["good.toml", "--set", "model.vocabulary=299"], "has 320 tokens, the model only 299"),
    "a run that is there": (["good.toml", "--out", "finished"], "finished already holds a training run"),
    "no run to resume": (["--resume", "empty"], "empty holds no training run"),
    "no folder to resume": (["--resume", "nowhere"], "nowhere holds no training run"),
    "no checkpoint to branch from": (["--branch", "finished", "--out", "x"], "finished is not a checkpoint"),
    "no such model to start from": (
        ["good.toml", "--set", "start_from=nothing"],
        "give one of a [model] section, start_from and target",
    ),
    "no such corpus": (["good.toml", *(o.replace("PATH", "nowhere") for o in OWN)], "nowhere does not exist"),
}
FAILURES = {
    "empty corpus": (["good.toml", *(o.replace("PATH", "empty") for o in OWN)], "the corpus is empty"),
    "no text in the corpus": (["good.toml", *(o.replace("PATH", "pictures") for o in OWN)], "a.png is not UTF-8 text"),
    "checkpoint of another shape": (["--resume", "finished", "--set", "model.hidden=16"], "they differ in hidden"),
    "checkpoint of another optimizer": (["--resume", "finished", "--set", "optim.name=muon"], "was written with adamw"),
    "only damaged checkpoints": (["--resume", "damaged"], "there is no whole checkpoint in damaged/checkpoints:\n"),
    "a branch of a damaged checkpoint": (
        ["--branch", "damaged/checkpoints/step-00000004", "--out", "x"],
        "step-00000004 is damaged: model.safetensors is not what was written",
    ),
}


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        *(pytest.param(2, *case, id=name) for name, case in USAGE.items()),
        *(pytest.param(1, *case, id=name) for name, case in FAILURES.items()),
    ],
)
def test_a_refusal_has_one_message_and_leaves_nothing(folder, command, code, arguments, message):
    before = tree(folder)
    status, out, errors = command("train", *arguments)
    assert errors.count("error: ") == 1
    assert message in errors[errors.index("error: ") :]
    assert "Traceback" not in errors
    assert (status, out) == (code, "")
    assert tree(folder) == before


def test_a_tokenizer_of_another_model(folder, command, finished):
    """A store may fit the vocabulary and still mean other tokens."""
    Path("corpus").mkdir()
    for number in range(40):
        Path(f"corpus/{number}").write_text(f"quite another text, number {number} " * 9)
    assert command("data", "build", "corpus", "--out", "other", "--vocabulary", "290", "--held-out", "0.2")[0] == 0
    before = tree(folder)
    arguments = ["--resume", "finished", "--set", "data.store=other"]
    status, _, errors = command("train", *arguments)
    assert (status, tree(folder)) == (1, before)
    assert errors.startswith("error: the token store other was built with another tokenizer\n")


def test_a_loss_that_is_not_finite(folder, command):
    """It ends the run with the step, and no checkpoint holds it."""
    options = ["--set", "optim.lr=1e30", "--set", "clip=1e30", "--set", "checkpoint_steps=1", "--out", "run"]
    status, _, errors = command("train", "good.toml", *options)
    assert status == 1
    assert "is nan at step" in errors or "is inf at step" in errors
    assert "penstock train --resume run --set optim.lr=" in errors
    assert "Traceback" not in errors
    found, faults = checkpoint.newest(Path("run/checkpoints"))
    assert faults == []
    assert found is None or all(tensor.isfinite().all() for tensor in tensors(found).values())


def test_passing_over_damage_is_told(folder, command):
    Path("finished/checkpoints/step-00000004/config.json").unlink()
    status, out, errors = command("train", "--resume", "finished")
    assert status == 0
    assert "passed over: finished/checkpoints/step-00000004 is damaged: config.json is missing" in errors
    assert "after 4 steps" in out


def test_showing_the_configuration_starts_nothing(folder, command):
    before = tree(folder)
    status, out, _ = command("train", "good.toml", "--set", "steps=7", "--show-config")
    assert status == 0
    assert json.loads(out)["steps"] == 7
    assert json.loads(out)["model"]["vocabulary"] == VOCABULARY
    assert tree(folder) == before


@pytest.mark.parametrize("minutes", ["0", "-1", "soon"])
def test_a_demonstration_of_no_time(folder, command, minutes):
    status, _, errors = command("demo", "--minutes", minutes)
    assert status == 2
    assert "Invalid value for '--minutes'" in errors
    assert not Path("runs").exists()


def test_a_demonstration_spares_what_is_not_a_run(folder, command):
    before = tree(folder)
    status, _, errors = command("demo", "--out", "pictures")
    assert (status, tree(folder)) == (2, before)
    assert "pictures exists and is not a run" in errors


def test_as_processes(folder):
    """The same, seen from a shell."""
    for code, arguments, message in (
        (2, ["train", "good.toml", "--set", "optim.rl=1"], "has no option 'rl'"),
        (1, ["train", "--resume", "damaged"], "there is no whole checkpoint"),
        (2, ["train", "--preset"], "requires an argument"),
    ):
        done = penstock(*arguments)
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_a_model_that_does_not_fit_its_heads_is_a_usage_error(store):
    with pytest.raises(PenstockError, match="multiple of kv_heads"):
        config(store, model={**MODEL, "kv_heads": 3})
