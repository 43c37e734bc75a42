"""Decoders that judge documents by their answer, over HTTP and in this process, beside transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers

from penstock.core.errors import ModelError, UsageError
from penstock.core.progress import silent
from penstock.models import hub
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.config import EngineConfig
from penstock.serve.embed.judge import Judge, open_judge
from penstock.serve.embed.pair_template import PairTemplate, open_template, writes_pairs
from penstock.serve.http.app import make_app
from penstock.serve.http.service import Limits, Service
from penstock.serve.http.text import Tokens
from penstock.serve.link import process, wire
from penstock.serve.messages import Delta, Embed, Request
from penstock.serve.offline.llm import LLM
from penstock.testing.transformers_peer import SHAPE, randomize

#: In the manner of Qwen3-Reranker's: the roles of sentence-transformers, an instruction, and the query first.
TEMPLATE = (
    '{%- set told = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}'
    'system: is it an answer?\n<Instruct>: {{ told | default("find the code", true) }}\n'
    '<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}\n'
    '<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}\n'
    'answer:{{ "\\n" }}'
)

QUERY = "sort a list of numbers that somebody gave me"
DOCUMENTS = ["sorted(numbers)", "A cat sleeps.", "x", "def sort(a):\n    return a", "if yes:\n    return no"]


def written(query: str, document: str, instruction: str = "find the code") -> str:
    head = f"system: is it an answer?\n<Instruct>: {instruction}\n"
    return f"{head}<Query>: {query}\n<Document>: {document}\nanswer:\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A decoder of Qwen3's kind that judges by two tokens; sentence-transformers' files say so."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    tokenizer = hub.load_tokenizer("python-1m")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval()
    randomize(model).save_pretrained(folder)
    modules = [("", "base.modules.transformer.Transformer"), ("1_LogitScore", "cross_encoder.modules.LogitScore")]
    listed = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    yes, no = answers(folder)
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
    return folder


WORDS = ("return", "if")


def answers(folder: Path) -> tuple[int, int]:
    known = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return known[WORDS[0]], known[WORDS[1]]


def logits(folder: Path, prompts: list[str]) -> list[float]:
    """What transformers says of each prompt alone: the logit of yes less that of no, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    yes, no = answers(folder)
    with torch.no_grad():
        last = [
            model(**tokenizer(each, return_tensors="pt", add_special_tokens=False)).logits[0, -1] for each in prompts
        ]
    return [(each[yes] - each[no]).item() for each in last]


class Engine:
    """What an engine's process runs, in this one; keeps how many tokens of each prompt were in the cache."""

    failure = None
    outstanding = 0

    def __init__(self, model: Path) -> None:
        config = EngineConfig(cache_tokens=4096, sequences=8, tokens=256, dtype="fp32")
        self._host, self.ready = process.opened(wire.Open(str(model), config.model_dump_json(), "cpu"), self)  # type: ignore[arg-type]
        self.watchers: list[Any] = []
        self.asked: list[Request] = []
        self.cached: list[tuple[str, int]] = []

    @property
    def snapshot(self) -> Any:
        return self._host.snapshot()

    async def embed(self, id: str, texts: list[list[int]], seconds: list[int] | None = None) -> np.ndarray:
        self._host.take(Embed(id, texts, seconds))
        found = np.zeros((len(texts), 1), np.float32)
        while self._host.busy:
            for each in self._host.step()[1]:
                found[each.places] = np.frombuffer(each.rows, np.float32).reshape(len(each.places), -1)  # type: ignore[union-attr]
        return found

    def send(self, message: wire.Message) -> None:
        raise AssertionError(message)

    async def stream(self, *requests: Request) -> AsyncIterator[Delta]:
        self.asked += requests
        left = len(requests)
        for each in requests:
            self._host.take(each)
        while left:
            for delta in self._host.step()[0]:
                left -= delta.finish is not None
                self.cached.append((delta.id.rpartition("/")[2], delta.cached))
                yield delta


@pytest.fixture(scope="module")
def service(folder) -> Service:
    tokenizer = hub.load_tokenizer(folder)
    judge = open_judge(folder, tokenizer)
    return Service("m", Tokens(tokenizer), Engine(folder), Limits(), judge=judge)  # type: ignore[arg-type]


def post(service: Service, path: str, body: dict[str, Any]) -> httpx.Response:
    async def posted() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service, [], False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=body)

    return asyncio.run(posted())


def answer(service: Service, path: str, body: dict[str, Any]) -> dict[str, Any]:
    found = post(service, path, body)
    assert found.status_code == 200, found.text
    return found.json()


def test_scores_and_rankings_are_what_transformers_computes(service, folder):
    expected = logits(folder, [written(QUERY, each) for each in DOCUMENTS])
    body = {"text_1": QUERY, "text_2": DOCUMENTS}
    raw = answer(service, "/v1/score", body | {"use_activation": False})
    assert [each["score"] for each in raw["data"]] == pytest.approx(expected, abs=1e-5)
    probable = torch.tensor(expected).sigmoid().tolist()
    found = answer(service, "/v1/score", body)
    assert [each["score"] for each in found["data"]] == pytest.approx(probable, abs=1e-5)
    order = sorted(range(len(DOCUMENTS)), key=lambda place: -expected[place])
    ranked = answer(service, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 3})
    assert [each["index"] for each in ranked["results"]] == order[:3]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    count = sum(len(tokens(written(QUERY, each))["input_ids"]) for each in DOCUMENTS)
    assert ranked["usage"]["prompt_tokens"] == count
    told = answer(service, "/v1/score", {**body, "instruct": "find a cat", "use_activation": False})
    other = logits(folder, [written(QUERY, each, "find a cat") for each in DOCUMENTS])
    assert [each["score"] for each in told["data"]] == pytest.approx(other, abs=1e-5)
    assert other != pytest.approx(expected, abs=1e-3)


def test_documents_share_what_stands_before_them(service):
    """The query is computed once, though nobody has asked it before."""
    engine = service.engine
    before, begun = len(engine.asked), len(engine.cached)  # type: ignore[attr-defined]
    query = "a query that nobody has asked before, of some length, so that it fills blocks of the cache"
    answer(service, "/v1/rerank", {"query": query, "documents": DOCUMENTS})
    prompts = {each.id.rpartition("/")[2]: each.prompt for each in engine.asked[before:]}  # type: ignore[attr-defined]
    first, *others = prompts.values()
    common = next(
        place
        for place in range(len(first))
        if any(each[place : place + 1] != first[place : place + 1] for each in others)
    )
    cached = dict(reversed(engine.cached[begun:]))  # type: ignore[attr-defined]  # the first time that each was asked
    assert cached.keys() == prompts.keys()
    assert min(each for place, each in cached.items() if place != "0") > max(common - 32, cached["0"])


def test_a_document_that_is_too_long_is_refused_or_cut(service, folder):
    body = {"text_1": QUERY, "text_2": "a b " * 200, "use_activation": False}
    refused = post(service, "/v1/score", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    found = answer(service, "/v1/score", body | {"truncate_prompt_tokens": 120})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    count = found["usage"]["prompt_tokens"]
    assert 115 <= count <= 120
    # Some beginning of the document with so many tokens is what was read.
    texts = [written(QUERY, body["text_2"][:left]) for left in range(1, 800)]
    cut = [text for text in texts if len(tokenizer(text)["input_ids"]) == count]
    nearest = min(abs(each - found["data"][0]["score"]) for each in logits(folder, cut))
    assert nearest < 1e-5
    short = post(service, "/v1/score", body | {"truncate_prompt_tokens": 9})
    assert "9 tokens are too few" in short.json()["error"]["message"]


def test_the_python_interface_says_the_same(folder):
    queries = [QUERY, "cats"]
    expected = logits(folder, [written(query, each) for query in queries for each in DOCUMENTS])
    with LLM(folder, device="cpu", progress=silent, cache_tokens=4096, dtype="fp32") as llm:
        found = llm.score(queries, DOCUMENTS, progress=silent)
    wanted = torch.tensor(expected).sigmoid().view(2, len(DOCUMENTS))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("top", [[(7, -1.0), (8, -3.0)], [(7, -1.0), (9, -2.0)]])
def test_a_token_that_is_not_told_is_asked_for(folder, top):
    """Both are known after a round where both are probable."""
    rounds = Judge(PairTemplate(hub.load_tokenizer(folder), TEMPLATE), 7, 8).rounds(2)
    probable, asked = top[1][0] == 8, list[list[tuple[int, tuple[int, ...] | None]]]()
    questions = next(rounds)
    with pytest.raises(StopIteration) as done:
        while True:
            asked.append([(place, sampling.allowed_tokens) for place, sampling in questions])
            told = [
                TokenLogprobs(8, -3.0, 30, top) if sampling.allowed_tokens == (8,) else TokenLogprobs(7, -1.0, 1, top)
                for _, sampling in questions
            ]
            questions = rounds.send(told)
    assert done.value.value == [2.0, 2.0]
    rest = [] if probable else [[(0, (8,)), (1, (8,))]]
    assert asked == [[(0, (7, 8)), (1, (7, 8))], *rest]


@pytest.fixture(scope="module")
def classifier(folder, tmp_path_factory) -> Path:
    """A decoder with a head of one row, and the same template."""
    place = tmp_path_factory.mktemp("classifier") / "classifier"
    tokenizer = hub.load_tokenizer(folder)
    tokenizer.save_pretrained(place)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 256, "num_labels": 1, "pad_token_id": 0}
    model = transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**shape)).eval()
    randomize(model).save_pretrained(place)
    return place


@pytest.mark.parametrize("templated", [True, False])
def test_a_decoder_with_a_scalar_head_scores_pairs_as_transformers_does(classifier, templated):
    tokenizer = hub.load_tokenizer(classifier)
    assert writes_pairs(tokenizer)
    assert not writes_pairs(hub.load_tokenizer("python-1m"))
    template = open_template(classifier, tokenizer) if templated else None
    service = Service("m", Tokens(tokenizer), Engine(classifier), Limits(), judge=template)  # type: ignore[arg-type]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(classifier)
    pairs = [(written(QUERY, each),) if templated else (QUERY, each) for each in DOCUMENTS]
    with torch.no_grad():
        expected = [model(**theirs(*each, return_tensors="pt")).logits.item() for each in pairs]
    body = {"query": QUERY, "documents": DOCUMENTS, "use_activation": False}
    ranked = answer(service, "/v1/rerank", body)["results"]
    assert {each["index"]: each["relevance_score"] for each in ranked} == pytest.approx(
        dict(enumerate(expected)), abs=1e-5
    )
    assert post(service, "/v1/completions", {"prompt": "x"}).status_code == 400


def opened(folder: Path, **options: Any) -> Judge | None:
    return open_judge(folder, transformers.AutoTokenizer.from_pretrained(folder), **options)


def test_a_folder_says_how_it_judges(folder, tmp_path):
    yes, no = answers(folder)
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "modules.json").unlink()
    assert opened(plain) is None
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"classifier_from_token": [WORDS[1], WORDS[0]]}))
    prompts = {"prompts": {"web": "search", "": ""}, "default_prompt_name": "web"}
    (plain / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    judge = opened(plain)
    assert judge is not None
    assert (judge.yes, judge.no, judge.template.instruction) == (yes, no, "search")
    tokenizer = judge.template.tokenizer
    assert tokenizer.decode(judge.template.prompt("q", "d")) == written("q", "d", "search")
    assert tokenizer.decode(judge.template.prompt("q", "d", "x")) == written("q", "d", "x")
    # A template of the caller's own, which has the document first and takes no instruction.
    template = tmp_path / "judge.jinja"
    template.write_text("{{ document }}\n{{ query }}?")
    own = opened(plain, template=template, answers=(WORDS[1], WORDS[0]))
    assert own is not None
    assert (own.yes, own.no, tokenizer.decode(own.template.prompt("q", "d"))) == (no, yes, "d\nq?")
    with pytest.raises(UsageError, match="no place for an instruction"):
        own.template.prompt("q", "d", "x")


def test_what_a_folder_does_not_say_is_refused(folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "1_LogitScore" / "config.json").write_text('{"true_token_id": 7, "false_token_id": null}')
    with pytest.raises(
        ModelError, match=r"by one token alone is not supported\n.*--rerank-answers YES,NO\), and a classifier with"
    ):
        opened(plain)
    template = tmp_path / "judge.jinja"
    for text, why in (("{{ query }}", "leaves out the document"), ("{{ query", "takes no query and document")):
        template.write_text(text)
        with pytest.raises(UsageError, match=why):
            opened(folder, template=template)
    with pytest.raises(UsageError, match="has no token 'perhaps so'"):
        opened(folder, answers=("perhaps so", "if"))
