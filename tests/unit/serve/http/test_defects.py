"""What nobody foresaw, in one request: it is answered as an error, and no other request hears of it."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from penstock.models import hub
from penstock.serve.http.app import make_app
from penstock.serve.http.service import Limits, Service
from penstock.serve.http.shapes import completions
from penstock.serve.http.text import Tokens
from penstock.serve.link.client import show
from penstock.serve.link.wire import Ready
from penstock.serve.messages import Delta, Finish
from penstock.serve.reader import Reader

WORD, POISON = 300, 301


class Engine:
    """Says a word three times, or what is asked for with a token to poison, in place of an engine."""

    ready = Ready(2048, 8, 4096, [], "plain")
    failure = None
    outstanding = 0

    def __init__(self) -> None:
        self.watchers, self.aborted = [], []

    async def stream(self, *requests):
        for place in range(3):
            await asyncio.sleep(0)
            for request in requests:
                token = POISON if POISON in request.prompt and place == 1 else WORD
                yield Delta(request.id, 0, [token], finish=Finish.LENGTH if place == 2 else None)

    def abort(self, id, index=None):
        self.aborted.append(id)


@pytest.fixture
def service():
    return Service("m", Tokens(hub.load_tokenizer("python-1m")), Engine(), Limits())


@pytest.fixture
def poisoned(monkeypatch):
    """Reading the token fails."""
    read = Reader.read

    def failing(self, delta):
        if POISON in delta.tokens:
            raise RuntimeError("Invalid prefix")
        return read(self, delta)

    monkeypatch.setattr(Reader, "read", failing)


def ask(service: Service, *bodies: dict) -> list[httpx.Response]:
    """The answers to requests that are under way together. An exception that went through would be raised here."""

    async def all_of_them():
        transport = httpx.ASGITransport(make_app(service, [], False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    return asyncio.run(all_of_them())


def outcomes(service: Service) -> dict[str, float]:
    names = ("length", "error", "disconnect")
    return {name: service.metrics.outcomes.labels(name)._value.get() for name in names}


def test_a_request_that_fails_is_a_500_in_openai_s_shape_and_others_go_on(service, poisoned):
    good, bad, other = ask(service, {"prompt": [WORD]}, {"prompt": [POISON]}, {"prompt": [WORD]})
    assert (good.status_code, other.status_code) == (200, 200)
    assert good.json()["choices"][0]["text"] == service.tokens.decode([WORD] * 3)
    assert bad.status_code == 500
    assert bad.json()["error"]["type"] == "server_error"
    assert "prefix" not in bad.text
    assert outcomes(service) == {"length": 2, "error": 1, "disconnect": 0}


def test_a_stream_that_breaks_off_ends_with_an_error_event(service, poisoned, caplog):
    good, bad = ask(service, {"prompt": [WORD], "stream": True}, {"prompt": [POISON], "stream": True})
    assert good.text.endswith("data: [DONE]\n\n")
    events = bad.text.removesuffix("\n\n").split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == service.tokens.decode([WORD])
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in bad.text
    assert outcomes(service) == {"length": 1, "error": 1, "disconnect": 0}
    assert "Invalid prefix" in caplog.text


def test_so_does_one_whose_chunks_cannot_be_written(service, monkeypatch):
    deltas = completions.Completions.deltas

    def failing(self, piece):
        if POISON in piece.tokens:
            raise ValueError("no such shape")
        return deltas(self, piece)

    monkeypatch.setattr(completions.Completions, "deltas", failing)
    good, bad = ask(service, {"prompt": [WORD], "stream": True}, {"prompt": [POISON], "stream": True})
    assert good.text.endswith("data: [DONE]\n\n")
    assert '"error"' in bad.text.split("\n\n")[-2]
    assert outcomes(service) == {"length": 1, "error": 1, "disconnect": 0}


def test_a_watcher_that_fails_keeps_nobody_from_the_answers(caplog):
    seen = []

    class Failing:
        def see(self, events, snapshot):
            raise OSError("the disk is full")

    class Seeing:
        def see(self, events, snapshot):
            seen.append(snapshot)

    show([Failing(), Seeing()], [], None)
    assert seen == [None]
    assert "Failing cannot take in" in caplog.text
