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
from penstock.data.loader import Batch
from penstock.models import hub
from penstock.train.batches import microbatches
from penstock.train.objectives.kto import KTO
from penstock.train.objectives.preference import Pairs
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits

RATINGS = [
    {"prompt": f"what is {i}?", "completion": f"{i} a word" if i % 3 else "no " * (i + 1), "label": bool(i % 3)}
    for i in range(7)
]
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


def rated(folder, chats: list[tuple[str, str]]) -> list[tuple[float, int]]:
    """What transformers finds: the log-probability and the tokens of each answer to a question."""
    peer, template, found = AutoModelForCausalLM.from_pretrained(folder), Template(folder), []
    for chat in chats:
        written = template.write(Conversation(turns(*chat)), "here")
        tokens, learnt = torch.tensor(written.tokens.astype("int64")), torch.from_numpy(written.learnt)
        with torch.no_grad():
            scores = peer(tokens[None]).logits[0, :-1].double().log_softmax(-1)
        picked = scores.gather(1, tokens[1:, None])[:, 0][learnt[1:]]
        found.append((picked.sum().item(), len(picked)))
    return found


def answers(folder) -> list[tuple[tuple[float, int], tuple[float, int]]]:
    """The same of each chosen and each rejected answer."""
    both = [rated(folder, [(pair["prompt"], pair[key]) for pair in PAIRS]) for key in ("chosen", "rejected")]
    return list(zip(*both, strict=True))


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


def test_kto_is_the_published_loss_with_z_of_a_row(model, tmp_path):
    """Beside TRL's formula over what transformers finds: mismatched answers are those of the record before."""
    path = write_lines(tmp_path / "ratings.jsonl", RATINGS)
    objective = {"name": "kto", "beta": 0.5, "good": 1.25, "bad": 2.0}
    options = chat_config(model, data={"ratings": str(path), "held_out": 0}, objective=objective, steps=12)
    first = Run.create(options, tmp_path / "run")
    at_first, count = losses(first, first.trainer.model)
    weights = [1.25 if rating["label"] else 2.0 for rating in RATINGS]
    assert count == len(RATINGS)
    assert at_first == pytest.approx(sum(weights) / 2, rel=1e-5), "nothing is learnt yet"
    assert train_to_the_end(first, silent)
    run = Run.reopen(tmp_path / "run")
    order = [*range(1, len(RATINGS)), 0]  # in the store
    own = [(RATINGS[i]["prompt"], RATINGS[i]["completion"]) for i in order]
    foreign = [(RATINGS[i]["prompt"], RATINGS[i - 1]["completion"]) for i in order]
    rewards, others = (
        [now - before for (now, _), (before, _) in zip(rated(run.folder / "model", c), rated(model, c), strict=True)]
        for c in (own, foreign)
    )
    rows, wanted = run.trainer.loader.packed.rows, 0.0
    assert len(rows) > 1
    assert max(map(len, rows)) > 1
    for row in rows:
        z = max(0.0, sum(others[e] for e in row) / len(row))
        for e in row:
            gain = rewards[e] - z if RATINGS[order[e]]["label"] else z - rewards[e]
            wanted += weights[order[e]] * (1 - 1 / (1 + math.exp(-0.5 * gain)))
    found, _ = losses(run, hub.load(run.folder, dtype=torch.float32))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found < 0.8 * at_first


def test_no_gradient_goes_through_ktos_z():
    """Where z is above 0, the answers to other questions are made neither more nor less probable."""
    own, foreign = torch.tensor([[-3.0, -4.0]], requires_grad=True), torch.tensor([[-1.0, -0.5]], requires_grad=True)
    ones, documents = torch.ones(1, 2), torch.tensor([[0, 1, 2, 3]])
    extras = {"reference": torch.full((1, 4), -9.0), "label": torch.tensor([[1.0, 1.0, 0.0, 0.0]])}
    pairs = Pairs(own, foreign, ones, ones, ones.bool())
    KTO().pair_loss(pairs, Batch(documents, documents, documents, extras)).sum().backward()
    assert foreign.grad is None
    assert own.grad[0, 0] < 0 < own.grad[0, 1]


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
