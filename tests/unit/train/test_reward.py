"""Reward models, beside transformers' sequence classifiers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from penstock import LLM
from penstock.core.errors import ConfigError, ModelError, UsageError
from penstock.core.progress import silent
from penstock.data.chats.messages import Conversation
from penstock.data.chats.template import Template
from penstock.models import hub
from penstock.models.adapters import peft
from penstock.models.attention import CausalRows
from penstock.search.scorers.contract import Candidate
from penstock.search.scorers.reward_model import RewardModel
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
    return {"preferences": str(path), "held_out": 0.4}


@pytest.fixture(scope="module")
def tuned(model, data, tmp_path_factory):
    """A run to its end, not to be written to."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run = Run.create(chat_config(model, data=data, objective="reward", steps=8, checkpoint_steps=4), folder)
    return train_to_the_end(run, silent) and folder


def rewards(folder, template: Template) -> dict[tuple[str, str], float]:
    """What transformers' classifier says of each conversation, whole."""
    peer, found = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32), {}
    assert peer.config.num_labels == 1
    for pair in PAIRS:
        for key in ("chosen", "rejected"):
            tokens = template.write(Conversation(turns(pair["prompt"], pair[key])), "here").tokens
            with torch.no_grad():
                found[pair["prompt"], pair[key]] = float(peer(torch.tensor(tokens[None].astype("int64"))).logits)
    return found


@pytest.fixture(scope="module")
def judged(model, tuned):
    return rewards(tuned / "model", Template(model))


def test_the_loss_is_that_of_transformers_rewards(tuned, judged):
    """Bradley and Terry's, over the pairs that are held out; and those of the others were learnt."""
    held, template = Run.reopen(tuned).material.store.split("held_out"), Template(tuned / "model")
    texts = [template.tokenizer.decode(held.read(i, 999)[0]) for i in range(0, 2 * held.count, 2)]
    margins, learnt = [], []
    for pair in PAIRS:
        margin = judged[pair["prompt"], pair["chosen"]] - judged[pair["prompt"], pair["rejected"]]
        (margins if any(pair["prompt"] in text for text in texts) else learnt).append(margin)
    assert len(margins) == held.count > 0
    wanted = sum(math.log1p(math.exp(-margin)) for margin in margins) / held.count
    assert json.loads((tuned / "summary.json").read_text())["held_out_loss"] == pytest.approx(wanted, rel=1e-4)
    assert min(learnt) > 0.5


def test_search_scores_with_it(tuned, judged):
    """A conversation that has ended is read whole, as in training; one that has not, up to there."""
    scorer = RewardModel(model=str(tuned))
    for (asked, said), wanted in judged.items():
        ended, unended = (Candidate(said, "", finished=finished) for finished in (True, False))
        found = scorer.score({"messages": turns(asked)}, [ended, unended])
        assert found[0] == pytest.approx(wanted, abs=1e-5)
        assert found[1] != pytest.approx(wanted, abs=1e-5)


def test_it_resumes_bit_for_bit_and_goes_on(model, data, tuned, tmp_path):
    Run.create(
        chat_config(model, data=data, objective="reward", steps=4, checkpoint_steps=4), tmp_path / "run"
    ).trainer.train()
    Run.reopen(tmp_path / "run", overrides=["steps=8"]).trainer.train()
    assert_same_bits(*(folder / "checkpoints" / "step-00000008" for folder in (tmp_path / "run", tuned)))
    further = Run.create(chat_config(tuned, data=data, objective="reward", steps=1), tmp_path / "further")
    assert torch.equal(further.trainer.model.head.weight, hub.load_reward(tuned).head.weight)


def test_its_head_is_trained_beside_an_adapter(model, data, tmp_path):
    options = chat_config(model, data=data, objective="reward", tuner="lora", steps=4, checkpoint_steps=2)
    run = Run.create(options, tmp_path / "run")
    first = run.trainer.model.head.weight.detach().clone()
    train_to_the_end(run, silent)
    head = hub.load_reward(tmp_path / "run").head.weight
    assert not torch.equal(head, first)
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    (last / "config.json").unlink()
    Run.reopen(tmp_path / "run").trainer.train()
    assert torch.equal(hub.load_reward(last).head.weight, head)
    told = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (told["task_type"], told["modules_to_save"]) == ("SEQ_CLS", ["score"])


@pytest.fixture(scope="module")
def adapted(model, data, tmp_path_factory):
    """The adapter of a run to its end."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    run = Run.create(chat_config(model, data=data, objective="reward", tuner="lora", steps=4), folder)
    train_to_the_end(run, silent)
    return folder / "adapter"


def test_its_adapter_is_read_back_as_the_model_that_it_was(model, adapted):
    template = Template(model)
    texts = [template.write(Conversation(turns("what is 1?", said)), "here").tokens for said in ("1 a word", "no no")]
    whole = hub.load_reward(adapted.parent)
    peer = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32), adapted
    ).eval()
    decoder = hub.load_reward(adapted)
    for text in texts:
        tokens = torch.tensor(text[None].astype("int64"))
        with torch.no_grad():
            told, same = (
                float(each.head(each(tokens, CausalRows.of(tokens.shape[1], "cpu")).hidden)[0, -1])
                for each in (decoder, whole)
            )
            assert told == pytest.approx(float(peer(tokens).logits), abs=1e-5)
            assert told == pytest.approx(same, abs=1e-5)
    assert "SequenceClassification" in (hub.resolve(adapted) / "config.json").read_text()
    with pytest.raises(UsageError, match="is a reward model, which gives a text a number"):
        LLM(str(adapted))
    with pytest.raises(ModelError, match="is the adapter of a reward model"):
        peft.read(adapted)


def test_an_adapter_that_peft_has_trained_is_read_with_its_head(model, adapted, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    torch.manual_seed(1)
    peer = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in peer.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    peer.save_pretrained(tmp_path)
    decoder, tokens = hub.load_reward(tmp_path), torch.arange(9)[None]
    with torch.no_grad():
        told = float(decoder.head(decoder(tokens, CausalRows.of(9, "cpu")).hidden)[0, -1])
        assert told == pytest.approx(float(peer(tokens).logits), abs=1e-4)


def test_it_is_refused_where_texts_are_written(tuned, data, tmp_path):
    with pytest.raises(UsageError, match="is a reward model, which gives a text a number and writes none"):
        LLM(str(tuned))
    with pytest.raises(ConfigError, match="is a reward model, which writes no text: the objective dpo cannot train it"):
        Run.create(chat_config(tuned, data=data, objective="dpo"), tmp_path / "run")
