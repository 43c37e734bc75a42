"""Training on pairs of answers, beside closed forms over log-probabilities that transformers computes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.core.errors import DataError
from penstock.core.progress import silent
from penstock.data.chats.messages import Conversation
from penstock.data.chats.template import Template
from penstock.models import hub
from penstock.train.batches import microbatches
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits

PAIRS = [{"prompt": f"what is {i}?", "chosen": f"{i} a word", "rejected": "no " * (i % 3 + 1)} for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)
    return {"preferences": str(path), "held_out": 0}


def losses(run: Run, model) -> tuple[float, int]:
    """The summed loss over all pairs of a run under ``model``, and how many there are."""
    loader, loss, count = run.trainer.loader, 0.0, 0
    for row in range(loader.samples):
        for micro, context in microbatches(loader.batch(row, 1), 128, None, torch.device("cpu")):
            loss += run.config.objective.loss(model, micro, context).item()
            count += int(run.config.objective.count(micro))
    return loss, count


def answers(folder) -> list[tuple[tuple[float, int], tuple[float, int]]]:
    """What transformers finds: the log-probability and the tokens of each chosen and each rejected answer."""
    peer, template, found = AutoModelForCausalLM.from_pretrained(folder), Template(folder), []
    for pair in PAIRS:
        both = []
        for key in ("chosen", "rejected"):
            written = template.write(Conversation(turns(pair["prompt"], pair[key])), "here")
            tokens, learnt = torch.tensor(written.tokens.astype("int64")), torch.from_numpy(written.learnt)
            with torch.no_grad():
                scores = peer(tokens[None]).logits[0, :-1].double().log_softmax(-1)
            picked = scores.gather(1, tokens[1:, None])[:, 0][learnt[1:]]
            both.append((picked.sum().item(), len(picked)))
        found.append(tuple(both))
    return found


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.fixture(scope="module")
def tuned(model, data, tmp_path_factory):
    """A run with dpo, not to be written to."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    options = chat_config(model, data=data, objective={"name": "dpo", "beta": 0.3}, steps=8, checkpoint_steps=4)
    return train_to_the_end(Run.create(options, folder), silent) and folder


def test_dpo_refers_to_the_model_at_the_beginning(model, tuned):
    run = Run.reopen(tuned)
    loss, count = losses(run, hub.load(tuned, dtype=torch.float32))
    wanted = 0.0
    for (first, second), (chosen, rejected) in zip(answers(model), answers(tuned / "model"), strict=True):
        wanted -= log_sigmoid(0.3 * (chosen[0] - first[0] - rejected[0] + second[0]))
    assert count == len(PAIRS)
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert loss / count < math.log(2) / 2, "it began at log 2, and has learnt"
    at_first, _ = losses(run, hub.load(model))
    assert at_first / count == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", ["orpo", "dpo"])
def test_objectives_without_a_reference(model, data, tmp_path, name):
    objective = {"name": name, "beta": 0.3} | ({"reference": False} if name == "dpo" else {})
    run = Run.create(chat_config(model, data=data, objective=objective), tmp_path / "run")
    assert not (tmp_path / "run" / "reference").exists()
    wanted = 0.0
    for (chosen, one), (rejected, other) in answers(model):
        if name == "dpo":
            wanted -= log_sigmoid(0.3 * (chosen - rejected))
        else:
            p, q = math.exp(chosen / one), math.exp(rejected / other)
            wanted += -math.log(p) - 0.3 * log_sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q)))
    assert losses(run, run.trainer.model)[0] == pytest.approx(wanted, rel=1e-4)


def test_dpo_resumes_bit_for_bit_and_needs_its_reference(model, data, tuned, tmp_path):
    options = chat_config(model, data=data, objective={"name": "dpo", "beta": 0.3}, steps=8, checkpoint_steps=4)
    run = Run.create(options, tmp_path / "run")
    run.trainer.train()
    last = tmp_path / "run" / "checkpoints" / "step-00000008"
    (last / "config.json").unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    assert_same_bits(last, tuned / "checkpoints" / "step-00000008")
    (tmp_path / "run" / "reference" / "train.bin").unlink()
    with pytest.raises(DataError, match="does not hold the log-probabilities of the model at the beginning"):
        Run.reopen(tmp_path / "run")
