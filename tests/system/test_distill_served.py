"""A model that learns from a server, beside the one that learns from the same teacher's folder."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from penstock.core.metrics import read_metrics
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.train.material.teacher import record_type
from programs import penstock, start
from served import Served
from tiny_chats import make_chat_model, turns, write_lines

STEPS, TOP = 6, 5
CHATS = [turns(f"what is {i}?", f"{i} a word " * (1 + i % 3), "and?", "no") for i in range(120)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A pupil, and a teacher with opinions."""
    folder = tmp_path_factory.mktemp("models")
    pupil = make_chat_model(folder / "pupil")
    teacher = folder / "teacher"
    shape = hub.read_config(pupil).model_copy(update={"layers": 1, "init_std": 0.5})
    hub.save(Decoder(shape).initialize(1), teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).write_bytes((pupil / name).read_bytes())
    return pupil, teacher


def command(pupil: Path, chats: Path, source: object, out: Path) -> list[str]:
    settings = {
        "start_from": pupil,
        "data.chats": chats,
        "objective.source": source,
        "objective.top": TOP,
        "batch.tokens": 256,
        "batch.micro_tokens": 128,
        "batch.stages": "[{length = 128}]",
        "steps": STEPS,
        "checkpoint_steps": 2,
        "precision": "fp32",
        "compile": "false",
        "device": "cpu",
    }
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["train", "--preset", "distill", *pairs, "--out", str(out)]


def said(run: Path) -> np.ndarray:
    return np.fromfile(run / "teacher" / "train.bin", record_type(TOP))


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_asks_a_server_ends_as_with_the_folder(models, tmp_path):
    """The same command goes on with what the teacher has not said yet."""
    pupil, teacher = models
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    here = penstock(*command(pupil, chats, teacher, tmp_path / "here"))
    assert here.returncode == 0, here.stderr
    whole, there = said(tmp_path / "here"), tmp_path / "there"
    with Served("--set", "dtype=fp32", model=str(teacher)) as server:
        line = command(pupil, chats, server.url, there)
        process, answers = start(*line), there / "teacher" / "train.bin"
        deadline = time.monotonic() + 240
        while not (answers.is_file() and answers.stat().st_size):
            assert process.poll() is None, process.errors()
            assert time.monotonic() < deadline, "the teacher is not asked"
            time.sleep(0.001)
        process.kill()
        process.wait()
        begun = answers.read_bytes()
        assert 0 < len(begun) < whole.nbytes
        again = penstock(*line)
        assert again.returncode == 0, again.stderr
        assert answers.read_bytes().startswith(begun)
        server.until_idle()
    found = said(there)
    assert np.array_equal(found["token"], whole["token"])
    np.testing.assert_allclose(found["logprob"], whole["logprob"], atol=1e-4)
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("here", "there")
    ]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = (hub.load(tmp_path / run).state_dict() for run in ("here", "there"))
    for name, weight in one.items():
        np.testing.assert_allclose(other[name], weight, atol=1e-5, err_msg=name)
