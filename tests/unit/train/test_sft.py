"""Fine-tuning on conversations, from a data set to a model that answers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock import LLM, SamplingParams
from penstock.core.errors import ConfigError, DataError
from penstock.core.metrics import read_metrics
from penstock.core.progress import silent
from penstock.data.chats.messages import Conversation
from penstock.data.chats.template import Template
from penstock.models import hub
from penstock.train.batches import microbatches
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_chats import TEMPLATE, chat_config, make_chat_model, turns, write_lines
from tiny_runs import assert_same_bits

#: What is asked and answered, enough of it for several rows.
ANSWERS = {f"what is {i}?": f"{i} a word" for i in range(6)}
CHATS = [turns(asked, answer, "and?", answer[::-1]) for asked, answer in ANSWERS.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", [{"messages": chat} for chat in CHATS])


@pytest.fixture(scope="module")
def tuned(model, chats, tmp_path_factory):
    """A run to its end, with nothing held out; not to be written to."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    data = {"chats": str(chats), "held_out": 0}
    assert train_to_the_end(Run.create(chat_config(model, data=data, steps=90), folder), silent)
    return folder


def test_the_loss_of_packed_rows_is_that_of_each_conversation_alone(model, chats, tmp_path):
    """transformers computes each conversation by itself: attention crosses no border, and positions start anew."""
    run = Run.create(chat_config(model, data={"chats": str(chats), "held_out": 0}), tmp_path / "run")
    loader, objective, device = run.trainer.loader, run.config.objective, torch.device("cpu")
    assert max(len(row) for row in loader.packed.rows) > 1
    ours = count = 0.0
    for row in range(loader.samples):
        for micro, context in microbatches(loader.batch(row, 1), 128, None, device):
            ours += objective.loss(run.trainer.model, micro, context).item()
            count += objective.count(micro).item()
    peer, template, theirs, learnt = AutoModelForCausalLM.from_pretrained(model), Template(model), 0.0, 0
    for chat in CHATS:
        written = template.write(Conversation(chat), "here")
        tokens = torch.tensor(written.tokens[None].astype("int64"))
        labels = tokens.masked_fill(~torch.from_numpy(written.learnt)[None], -100)
        theirs += peer(tokens, labels=labels).loss.item() * int(written.learnt.sum())
        learnt += int(written.learnt.sum())
    assert count == learnt
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_trained_model_answers_as_it_was_taught(tuned):
    """It is served as the run folder that it is, and stops where its answers do."""
    asked = [turns(each) for each in ANSWERS]
    found = LLM(str(tuned)).chat(asked, SamplingParams(max_tokens=30, temperature=0.0), progress=silent)
    assert [each.outputs[0].text for each in found] == list(ANSWERS.values())
    assert {each.outputs[0].finish_reason for each in found} == {"stop"}
    ends = json.loads((tuned / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) >= {hub.load_tokenizer(tuned).convert_tokens_to_ids("<|im_end|>")}


def test_what_is_held_out_is_measured(model, chats, tmp_path, capsys):
    data = {"chats": str(chats), "held_out": 0.5}
    run = Run.create(chat_config(model, data=data, steps=4, validation={"every": 2}), tmp_path / "run")
    summary = train_to_the_end(run, silent)
    assert 0 < summary["documents"] < len(CHATS)
    measured = run.material.evaluate(hub.load(tmp_path / "run", dtype=torch.float32))
    assert summary["held_out_loss"] == pytest.approx(measured, rel=1e-5)
    assert summary["best_held_out_loss"] == pytest.approx(measured, rel=1e-5)
    key = "validation_held_out_loss"
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if key in r] == [2, 4]
    assert re.search(r"\d\.\d+ nats a token on held-out examples after 4 steps", capsys.readouterr().out)


def test_a_run_on_conversations_resumes_bit_for_bit(model, chats, tmp_path):
    data = {"chats": str(chats), "held_out": 0.0}
    options = chat_config(model, data=data, steps=6, checkpoint_steps=3, keep_checkpoints=9)
    Run.create(options, tmp_path / "whole").trainer.train()
    Run.create(options, tmp_path / "run").trainer.train()
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "config.json").unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    assert_same_bits(*(tmp_path / name / "checkpoints" / "step-00000006" for name in ("run", "whole")))


def test_a_template_of_ones_own_goes_into_the_model(chats, tmp_path):
    model = make_chat_model(tmp_path / "model", template=None)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    data = {"chats": str(chats), "held_out": 0}
    with pytest.raises(DataError, match="has no chat template"):
        Run.create(chat_config(model, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    data |= {"chat_template": str(tmp_path / "own.jinja")}
    train_to_the_end(Run.create(chat_config(model, data=data, steps=1), tmp_path / "run"), silent)
    assert hub.load_tokenizer(tmp_path / "run").chat_template == TEMPLATE


def test_skipped_and_cut_conversations_are_told(model, tmp_path):
    records = [{"messages": turns("what", "a word")}, {"messages": turns("x")}, {"messages": turns("a", "word " * 300)}]
    chats = write_lines(tmp_path / "chats.jsonl", records)
    data = {"chats": str(chats), "held_out": 0, "skip_bad": True}
    notes = Run.create(chat_config(model, data=data), tmp_path / "run").notes
    assert any(re.match("1 records were skipped, the first since .*line 2 is a conversation without", n) for n in notes)
    assert "1 chats are longer than 128 tokens, and cut there" in notes


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": {}}, "learns from chats, and data.chats names none"),
        ({"batch": {"tokens": 256, "stages": [{"length": 128}, {"length": 64}]}}, "rows of one length"),
        ({"objective": "next_token"}, "data.chats is given, and the objective next_token learns from texts"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_data_is_read(model, chats, tmp_path, changes, why):
    with pytest.raises(ConfigError, match=why):
        Run.create(chat_config(model, **{"data": {"chats": str(chats)}, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_data_set_than_the_stores_is_refused(tuned, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", [{"messages": turns("x", "y")}])
    with pytest.raises(ConfigError, match=r"is not the one that the configuration describes:\n  data.chats"):
        Run.reopen(tuned, overrides=[f"data.chats={other}"])


def test_new_tokens_of_a_template_are_learnt(chats, tmp_path):
    """By a model whose tokenizer has none of them: they come behind those that it has, and end its answers."""
    model = make_chat_model(tmp_path / "model", template=None)
    own = TEMPLATE.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|done|>")
    (tmp_path / "own.jinja").write_text(own)
    data = {"chats": str(chats), "held_out": 0, "chat_template": str(tmp_path / "own.jinja")}
    data["new_tokens"] = ["<|turn|>", "<|done|>"]
    run = Run.create(chat_config(model, data=data, steps=40, checkpoint_steps=20), tmp_path / "run")
    before, rows = hub.load(model).embedding.weight, run.trainer.model.embedding.weight
    size = len(before)
    assert torch.equal(rows[:size], before)
    torch.testing.assert_close(rows[size:], before.mean(0).expand(2, -1))
    assert run.trainer.model.head.weight is rows
    assert train_to_the_end(run, silent)
    tokenizer = hub.load_tokenizer(tmp_path / "run")
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<|turn|>", "<|done|>")] == [size, size + 1]
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert peer.config.vocab_size == len(peer.get_input_embeddings().weight) == size + 2
    sampling = SamplingParams(max_tokens=30, temperature=0.0)
    (said,) = LLM(str(tmp_path / "run")).chat([turns(next(iter(ANSWERS)))], sampling, progress=silent)[0].outputs
    assert said.text.endswith(" a word")
    assert said.finish_reason == "stop"
    again = Run.reopen(tmp_path / "run", overrides=["steps=41"])
    assert again.trainer.model.config.vocabulary == size + 2


def test_new_tokens_need_an_embedding_that_is_trained(model, chats):
    with pytest.raises(ConfigError, match="learnt by the embedding, which the tuner lora leaves as it is"):
        chat_config(model, data={"chats": str(chats), "new_tokens": ["<|x|>"]}, tuner="lora")
