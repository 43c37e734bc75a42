"""What no client should send: it gets an error in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from served import Served

CHAT = "/v1/chat/completions"
DEEP = "[" * 50_000 + "]" * 50_000


def nested(depth: int) -> dict:
    """A schema of objects in objects."""
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.fixture(autouse=True)
def unharmed(server):
    yield
    server.until_idle()
    assert server.post("/v1/completions", prompt="x", max_tokens=1, temperature=0).status_code == 200


def send(server: Served, path: str, content: bytes, kind: str = "application/json"):
    """The status and message of the answer to a body, which must have the shape of an error."""
    answer = server.http.post(path, content=content, headers={"content-type": kind})
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"prompt": "\xff"}',
        b"\xff\xfe{}",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "top_p": -Infinity}',
        b'{"prompt": "x", "max_tokens": 1e2}',
        b'{"prompt": "x", "max_tokens": "7"}',
        b'{"prompt": "x", "max_tokens": true}',
        b'{"prompt": "x", "max_tokens": 99999999999999999999999}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "seed": 18446744073709551616}',
        b'{"prompt": "x", "n": 0}',
        b'{"prompt": "x", "n": -1}',
        b'{"prompt": "x", "stream": "yes"}',
        b'{"prompt": "x", "logit_bias": {"x": 1}}',
        b'{"prompt": "x", "logit_bias": {"99999999": 1}}',
        b'{"prompt": "x", "logit_bias": {"5": NaN}}',
        b'{"prompt": "x", "stop": [1]}',
        b'{"prompt": "x", "stop": ["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"]}',
        b'{"prompt": "x", "stop_token_ids": [-1]}',
        b'{"prompt": "x", "priority": -1}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": [1, "x"]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [99999999999999999999]}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": {}}',
        b'{"model": 5, "prompt": "x"}',
        f'{{"prompt": {DEEP}}}'.encode(),
        f'{{"prompt": "x", "rule": {DEEP}}}'.encode(),
    ],
    ids=range(36),
)
def test_completions_refuse(server, content):
    status, message = send(server, "/v1/completions", content)
    assert status == 400
    assert message
    assert len(message) < 2000


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "king", "content": "x"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "x", "more": "\ud800"}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": "x"},
        {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"},
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 21},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json"}},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object", "regex": "x"}},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "regex", "regex": "("}},
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "ebnf", "ebnf": "start: start start"},
        },
    ],
    ids=range(14),
)
def test_chats_refuse(server, body):
    assert send(server, CHAT, json.dumps(body).encode())[0] == 400


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "images are not supported"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "sounds are not supported"),
        ({"type": "text"}, "messages.0.content.1.text: Field required"),
        ("x", "messages.0.content.1: "),
    ],
)
def test_errors_name_the_branch_that_was_meant(server, part, message):
    content = [{"type": "text", "text": "What is this?"}, part]
    body = {"messages": [{"role": "user", "content": content}]}
    status, told = send(server, CHAT, json.dumps(body).encode())
    assert status == 400
    assert message in told


def test_errors_are_not_of_a_branch_that_nobody_meant(server):
    body = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    error = server.http.post(CHAT, json=body).json()["error"]
    assert error["param"] == "messages"
    assert error["message"] == "messages.0.content.0: images are not supported: a message is text"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex", "regex": "(((a{999}){999}){999})"},
        {"type": "regex", "regex": "(a|a?)+" * 500},
        {"type": "ebnf", "ebnf": "start: " + "(" * 4000 + '"a"' + ")" * 4000},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(400)}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:1/"}}},
    ],
    ids=range(6),
)
def test_grammar_bombs_go_off_or_are_refused_soon(server, form):
    messages = [{"role": "user", "content": "x"}]
    answer = server.post(CHAT, messages=messages, max_tokens=4, response_format=form)
    assert answer.status_code in (200, 400)


@pytest.mark.parametrize("depth", [100, 250, 900, 2000])
def test_things_within_things(server, depth):
    deep = '{"a":' * depth + "1" + "}" * depth
    for more in (f'"tools": [{deep}]', f'"rule": {deep}', f'"response_format": {{"type": "json_schema", "s": {deep}}}'):
        body = f'{{"messages": [{{"role": "user", "content": "x", "y": {deep}}}], "max_tokens": 1, {more}}}'
        answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400)


def test_other_kinds_of_bodies(server):
    assert send(server, "/v1/completions", b"prompt=x", "application/x-www-form-urlencoded")[0] == 400
    # A page of another origin may send this without asking first.
    assert send(server, "/v1/completions", b'{"prompt": "x"}', "text/plain")[0] == 400


def test_a_body_over_the_limit(server):
    status, message = send(server, "/v1/completions", b" " * (2**18 + 1))
    assert (status, message) == (413, "the body is larger than 262144 bytes")

    def unannounced():
        for _ in range(5):
            yield b" " * 2**16

    answer = server.http.post("/v1/completions", content=unannounced(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (413, message)


def test_other_paths_and_methods(server):
    for method, path, status in [("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)]:
        answer = server.http.request(method, path)
        assert (answer.status_code, set(answer.json())) == (status, {"error"})


@pytest.mark.parametrize(
    "text",
    [
        b"\0" * 100,
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 10**6,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=range(6),
)
def test_what_is_hardly_http(server, text):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
        except OSError:  # the server hung up before it had read everything
            return
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    if answer:
        assert b'{"error":' in answer


def test_a_server_out_of_descriptors_says_so_seldom_and_comes_back():
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("the limits of another process cannot be set here")
    with Served() as server:
        host, port = server.url.removeprefix("http://").split(":")
        opened = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (opened + 4, opened + 4))
        connections = [socket.create_connection((host, int(port))) for _ in range(64)]
        end = time.monotonic() + 60
        while "new connections have to wait" not in server.said():
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(1)  # in which it tries again and again
        assert 1 <= server.said().count("new connections have to wait") < 20
        assert len(server.said()) < 20_000
        for connection in connections:
            connection.close()
        assert server.http.get("/health").status_code == 200


def test_nobody_without_a_key_learns_anything(server):
    schema = server.http.get("/openapi.json").json()
    with httpx.Client(base_url=server.url) as stranger:
        for path, operations in schema["paths"].items():
            for method in operations:
                answer = stranger.request(method, path.replace("{name}", "x"), content=b"{")
                assert answer.status_code == (200 if path == "/health" else 401), (method, path)
                if path != "/health":
                    assert answer.headers["www-authenticate"] == "Bearer"
        for header in ("secret-1", "Basic secret-1", "Bearer", "Bearer secret-1 x", "Bearer é".encode()):
            assert stranger.get("/v1/models", headers={"authorization": header}).status_code == 401
        assert stranger.get("/openapi.json").status_code == 401
        assert stranger.get("/").status_code == 200


def bounded(body: object) -> object:
    """The body of a request, which asks for no more than three tokens."""
    if isinstance(body, dict):
        most = body.get("max_tokens")
        for other in ("max_completion_tokens", "max_output_tokens"):
            body.pop(other, None)
        if most is None or (isinstance(most, int) and most > 3):
            body["max_tokens"] = 3
    return body


@pytest.mark.parametrize("examples", [4, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_whatever_the_schema_allows_or_forbids(server, mode, examples):
    """Requests made up from the OpenAPI description: no 5xx, and answers as described."""
    import schemathesis

    description = server.http.get("/openapi.json").json()
    for path in ("/events", "/pause", "/resume", "/sleep", "/wake"):  # the first never ends, the others end the rest
        del description["paths"][path]
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=server.url)
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    assert (len(operations), len(posts)) == (27, 14)
    for operation in operations if mode == "positive" else posts:
        assert asked(server, operation, mode, examples) >= (examples if operation in posts else 1)


def asked(server: Served, operation, mode: str, examples: int) -> int:
    """How many requests were made up, and answered as they must be."""
    import schemathesis

    count, checks = 0, schemathesis.checks
    wanted = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]

    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def obeys(case):
        nonlocal count
        count += 1
        if operation.path.endswith(("completions", "responses", "messages")):
            case.body = bounded(case.body)
        answer = case.call(headers=dict(server.http.headers), timeout=60)
        case.validate_response(answer, checks=wanted)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    obeys()
    return count
