"""Who gets past the guard, and with how large a body."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from penstock.serve.http.guard import Guard, is_loopback


async def told(scope, receive, send):
    """Says what arrived."""
    request = Request(scope, receive)
    size = len(await request.body())
    await JSONResponse({"key": request.state.key, "size": size})(scope, receive, send)


def ask(guard: Guard, path: str = "/v1/models", **options) -> httpx.Response:
    async def once():
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, **options)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("", False),
    ],
)
def test_loopback(host, local):
    assert is_loopback(host) == local


def test_each_key_is_known_and_has_a_name_of_its_own():
    guard = Guard(told, keys=["one", "two"], local=False, body=100)
    names = [ask(guard, headers={"authorization": f"Bearer {key}"}).json()["key"] for key in ("one", "two", "one")]
    assert names[0] == names[2] != names[1]
    assert "one" not in names[0]


@pytest.mark.parametrize(
    "header", ["", "one", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "Bearer one two"]
)
def test_other_keys_are_not(header):
    answer = ask(Guard(told, keys=["one"], local=False, body=100), headers={"authorization": header})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/", "/health"])
def test_some_paths_need_no_key(path):
    assert ask(Guard(told, keys=["one"], local=False, body=100), path).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/events", "/health/", "/%2e", "/openapi.json"])
def test_no_other_path_does(path):
    assert ask(Guard(told, keys=["one"], local=False, body=100), path).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),
        ("192.168.0.1", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
def test_a_local_server_answers_to_local_names_alone(host, status):
    assert ask(Guard(told, keys=[], local=True, body=100), headers={"host": host}).status_code == status
    assert ask(Guard(told, keys=[], local=False, body=100), headers={"host": host}).status_code == 200


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 5000])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_up_to_the_limit(size, announced):
    async def pieces():
        for start in range(0, size, 30):
            yield b"x" * min(30, size - start)

    answer = ask(Guard(told, keys=[], local=False, body=100), content=b"x" * size if announced else pieces())
    if size <= 100:
        assert answer.json() == {"key": "", "size": size}
    else:
        assert answer.status_code in ((413,) if announced else (413, 500))
