"""Reward models against transformers' sequence classifiers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from penstock.core.errors import ModelError, UsageError
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.search.scorers.contract import Candidate
from penstock.search.scorers.reward_model import RewardModel
from penstock.testing.transformers_peer import SHAPE, TOKEN_IDS, randomize


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((hub.resolve("python-1m") / name).read_bytes())
    return folder, model


def test_rewards_are_those_of_transformers_whatever_is_scored_beside(classifier):
    folder, model = classifier
    tokenizer = hub.load_tokenizer(folder)
    texts = ["", "    return a + b\n", "    return a\n    # and more\n", " x"]
    with torch.inference_mode():
        wanted = [
            float(model(torch.tensor([tokenizer("def add(a, b):\n" + text)["input_ids"]])).logits) for text in texts
        ]
    for batch in (1, 3, 8):
        scorer = RewardModel(model=str(folder), batch=batch)
        found = scorer.score({"prompt": "def add(a, b):\n"}, [Candidate(text, "") for text in texts])
        assert found == pytest.approx(wanted, abs=1e-5)


def test_what_is_no_reward_model_is_refused():
    with pytest.raises(UsageError, match="it is no reward model"):
        RewardModel(model="python-1m").score({"prompt": "a"}, [Candidate("b", "")])


@pytest.mark.parametrize("told", [{"id2label": {"0": "bad", "1": "so", "2": "good"}}, {"num_labels": 3}])
def test_a_classifier_with_several_labels_is_told_what_is_accepted(classifier, tmp_path, told):
    hub_config = json.loads((classifier[0] / "config.json").read_text())
    hub_config.pop("id2label", None)
    (tmp_path / "config.json").write_text(json.dumps(hub_config | told))
    with pytest.raises(ModelError, match="sorts texts into 3 kinds") as raised:
        hub.load_reward(tmp_path)
    assert "a classifier with one label" in str(raised.value)
    assert "a decoder that answers yes or no" in str(raised.value)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "qwen3"])
def test_classifiers_of_families_are_read_and_written(family, tmp_path):
    """Whatever a family does to its logits and its head, a reward has none of it."""
    config = transformers.AutoConfig.for_model(family, **SHAPE, **dict.fromkeys(TOKEN_IDS), num_labels=1)
    peer = randomize(transformers.AutoModelForSequenceClassification.from_config(config).eval())
    peer.save_pretrained(tmp_path / "theirs")
    decoder = hub.load_reward(tmp_path / "theirs")
    hub.save(decoder, tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.arange(9)[None] * 5 % 61
    with torch.inference_mode():
        wanted = float(peer(tokens).logits)
        found = decoder.head(decoder(tokens, CausalRows.of(9, "cpu")).hidden)[0, -1]
        assert float(found) == pytest.approx(wanted, abs=1e-4)
        assert float(again(tokens).logits) == pytest.approx(wanted, abs=1e-5)
