"""Calls of functions and thoughts as OpenAI's clients meet them. The model knows nothing of them: what it says is held
to a grammar, and a template that repeats a given answer stands for a model that writes it of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from penstock.core.randomness import numpy_generator
from penstock.models import hub
from served import MODEL, Served

#: As Qwen3's, in short.
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n'
    "{% endfor %}assistant:"
    "{% if enable_thinking %}<think>\n{% elif enable_thinking is defined %}<think>\n\n</think>\n\n{% endif %}"
)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Köln", "Bonn"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}
MESSAGES = [{"role": "user", "content": "What will the weather be?"}]


def with_markers(folder: Path) -> None:
    """The model with Qwen's markers as its last tokens, and a template."""
    shutil.copytree(hub.resolve(MODEL), folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first = max(vocabulary.values()) + 1 - len(MARKERS)
    gone = {piece for piece, token in vocabulary.items() if token >= first}
    tokenizer["model"]["vocab"] = {piece: token for piece, token in vocabulary.items() if piece not in gone}
    tokenizer["model"]["merges"] = [
        merge for merge in tokenizer["model"]["merges"] if not gone & {*merge, "".join(merge)}
    ]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [{"id": first + place, "content": each, **plain} for place, each in enumerate(MARKERS)]
    path.write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("model") / MODEL
    with_markers(folder)
    with Served(model=str(folder)) as server:
        yield server
        assert not server.until_idle()["cache_blocks_held"]


@pytest.fixture(scope="module")
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, stream: bool = False, **options: Any) -> SimpleNamespace:
    """The answer, whole or gathered from a stream: content, thoughts, calls (name, arguments, id), how it ended."""
    given = {"model": MODEL, "messages": MESSAGES, "max_tokens": 160, "seed": 1, **options}
    if not stream:
        choice = client.chat.completions.create(**given).choices[0]
        message = choice.message
        calls = [(each.function.name, each.function.arguments, each.id) for each in message.tool_calls or ()]
        thought = getattr(message, "reasoning_content", None)
        return SimpleNamespace(content=message.content, thought=thought, calls=calls, finish=choice.finish_reason)
    found = SimpleNamespace(content="", thought="", calls=[], finish=None)
    for chunk in client.chat.completions.create(**given, stream=True):
        choice = chunk.choices[0]
        found.content += choice.delta.content or ""
        found.thought += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert (call.index, call.type) == (len(found.calls), "function")
                found.calls.append([call.function.name, "", call.id])
            found.calls[call.index][1] += call.function.arguments or ""
        found.finish = choice.finish_reason or found.finish
    found.content, found.thought = found.content or None, found.thought or None
    found.calls = [tuple(call) for call in found.calls]
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("required", None, {"get_weather", "now"}),
        ("any", False, {"get_weather", "now"}),
        ({"type": "function", "function": {"name": "get_weather"}}, None, {"get_weather"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            False,
            {"get_weather"},
        ),
    ],
)
def test_a_call_that_has_to_be_made_fits_its_schema(client, stream, choice, parallel, names):
    options = {} if parallel is None else {"parallel_tool_calls": parallel}
    answer = ask(client, stream, tools=TOOLS, extra_body=QUIET | {"tool_choice": choice, **options})
    if parallel is None and choice == "required":
        # It calls on and on, and is cut off.
        assert len(answer.calls) > 1
    else:
        assert (answer.content, answer.finish, len(answer.calls)) == (None, "tool_calls", 1)
    for name, arguments, id in answer.calls[: None if answer.finish == "tool_calls" else -1]:
        assert name in names
        assert id.startswith("call_")
        if name == "get_weather":
            jsonschema.validate(json.loads(arguments), WEATHER)
    assert len({id for *_, id in answer.calls}) == len(answer.calls)


def test_a_stream_has_the_calls_of_the_whole(client):
    whole, stream = (ask(client, each, tools=TOOLS, tool_choice="required", extra_body=QUIET) for each in (False, True))
    assert [call[:2] for call in stream.calls] == [call[:2] for call in whole.calls]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_a_model_writes_of_itself_are_read(client, stream):
    text = 'So.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    rules = r'start: "So.\n" <tool_call> "\n{\"name\": \"now\", \"arguments\": {}}\n" </tool_call>'
    form = {"response_format": {"type": "ebnf", "ebnf": rules}}
    answer = ask(client, stream, tools=TOOLS, extra_body=QUIET | form)
    assert (answer.content, [call[:2] for call in answer.calls], answer.finish) == (
        "So.",
        [("now", "{}")],
        "tool_calls",
    )
    for options in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        assert ask(client, stream, **options, extra_body=QUIET | form).content == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_is_free_and_limited_and_then_the_grammar_holds(client, stream):
    form = {"type": "regex", "regex": "yes|no"}
    limited = THINK | {"thinking_token_budget": 6}
    answer = ask(client, stream, response_format=form, extra_body=limited)
    assert answer.content in ("yes", "no")
    assert answer.finish == "stop"
    assert 0 < len(answer.thought) < 60
    without = ask(client, stream, response_format=form, extra_body=THINK | {"thinking_token_budget": 0})
    assert without.content in ("yes", "no")
    assert without.thought is None
    hidden = ask(client, stream, response_format=form, extra_body=limited | {"include_reasoning": False})
    assert (hidden.thought, hidden.content) == (None, answer.content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_without_limit_may_be_all_there_is(client, stream):
    answer = ask(client, stream, max_tokens=20, response_format={"type": "json_object"}, extra_body=THINK)
    assert (answer.content, answer.finish) == (None, "length")
    assert len(answer.thought) > 20


def test_a_thought_before_a_free_answer_is_limited(client):
    answer = ask(client, max_tokens=40, extra_body=THINK | {"thinking_token_budget": 6, "ignore_eos": True})
    assert 0 < len(answer.thought) < 60
    assert len(answer.content) > 10


def test_a_call_behind_a_thought(client):
    choice = {"type": "function", "function": {"name": "now"}}
    answer = ask(client, tools=TOOLS, tool_choice=choice, extra_body=THINK | {"thinking_token_budget": 6})
    assert 0 < len(answer.thought) < 60
    assert [call[:2] for call in answer.calls] == [("now", "{}")]


def test_no_thought_where_the_prompt_has_ended_it(client):
    more = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=5, extra_body=more)
    assert answer.thought is None
    assert answer.content.lstrip().startswith("{")


def test_a_conversation_with_calls_and_results(served):
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    tokens = served.post("/tokenize", messages=messages, tools=TOOLS).json()["tokens"]
    text = served.post("/detokenize", tokens=tokens).json()["prompt"]
    assert '<tool_call>\n{"name": "now", "arguments": {"zone": "CET"}}\n</tool_call>' in text
    assert "tool: noon" in text
    assert '"name": "get_weather"' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice wants a call, and there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "late"}}}, "names 'late'"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "two tools are called 'get_weather'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tool 1 is no function"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}],
                "tool_choice": "required",
            },
            "function 'f' cannot be held to its parameters",
        ),
    ],
)
def test_what_cannot_be_done_is_said(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, extra_body=options)


#: What packages for agents sent, a request a line: their fields and values are theirs.
RECORDED = [json.loads(line) for line in (Path(__file__).parents[1] / "agent_requests.jsonl").read_text().splitlines()]


def gathered(answer: httpx.Response, chat: bool, stream: bool) -> SimpleNamespace:
    """Content, calls (name, arguments), and whether it is complete, of an answer as the openai package reads it."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(line) for line in lines] if stream else [answer.json()]
    if not chat:
        response = Response.model_validate(parts[-1]["response"] if stream else parts[0])
        calls = [(each.name, each.arguments) for each in response.output if each.type == "function_call"]
        return SimpleNamespace(content=response.output_text, calls=calls, whole=response.status == "completed")
    if not stream:
        choice = ChatCompletion.model_validate(parts[0]).choices[0]
        calls = [(each.function.name, each.function.arguments) for each in choice.message.tool_calls or ()]
        return SimpleNamespace(content=choice.message.content, calls=calls, whole=choice.finish_reason != "length")
    found = SimpleNamespace(content="", calls=[], whole=True)
    for chunk in map(ChatCompletionChunk.model_validate, parts):
        for choice in chunk.choices:
            found.content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                found.calls += [] if call.id is None else [(call.function.name, "")]
                name, arguments = found.calls[call.index]
                found.calls[call.index] = (name, arguments + (call.function.arguments or ""))
            found.whole = found.whole and choice.finish_reason != "length"
    return found


def named(recorded: dict[str, Any]) -> str:
    """What a recorded request is called."""
    body = recorded["body"]
    turns = len(body.get("messages", body.get("input")))
    forms = [name for name in ("tool_choice", "response_format", "text", "stream") if body.get(name)]
    return "-".join([recorded["client"].partition(" ")[0], recorded["path"].split("/")[2], *forms, str(turns)])


@pytest.mark.parametrize("recorded", RECORDED, ids=map(named, RECORDED))
def test_what_packages_for_agents_send_is_taken_as_it_is(served, recorded):
    body, chat = recorded["body"], "chat" in recorded["path"]
    answer = served.post(recorded["path"], **body | {"model": MODEL, "seed": 1} | QUIET)
    assert answer.status_code == 200, answer.text
    assert "penstock-ignored" not in answer.headers
    found = gathered(answer, chat, body.get("stream", False))
    schemas = {
        tool.get("function", tool)["name"]: tool.get("function", tool)["parameters"] for tool in body.get("tools", [])
    }
    if body.get("tool_choice"):
        assert found.calls
        assert found.whole or body.get("parallel_tool_calls") is None
        for name, arguments in found.calls if found.whole else found.calls[:-1]:
            jsonschema.validate(json.loads(arguments), schemas[name])
    form = body.get("response_format") or body.get("text", {}).get("format")
    if form:
        assert found.whole
        jsonschema.validate(json.loads(found.content), form.get("json_schema", form)["schema"])


def drawn_schema(draw: np.random.Generator, depth: int) -> dict[str, Any]:
    """A schema of values that end."""
    least = int(draw.integers(-50, 50))
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": int(draw.integers(1, 12))},
        {"type": "string", "enum": ["Köln", 'a "b"', "\n\\"]},
        {"type": "string", "pattern": "^[a-f]{2}-[0-9]{1,3}$"},
        {"type": "integer", "minimum": least, "maximum": least + int(draw.integers(0, 200))},
        {"type": "boolean"},
        {"type": "null"},
        {"const": 7},
        {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 4}]},
    ]
    if depth and draw.random() < 0.5:
        kinds = [
            drawn_object(draw, depth - 1),
            {"type": "array", "items": drawn_schema(draw, depth - 1), "minItems": 1, "maxItems": 3},
        ]
    return kinds[int(draw.integers(len(kinds)))]


def drawn_object(draw: np.random.Generator, depth: int = 1) -> dict[str, Any]:
    """A schema of objects, some of whose properties are required."""
    properties = {f"p{place}": drawn_schema(draw, depth) for place in range(int(draw.integers(1, 4)))}
    required = [name for name in properties if draw.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_calls_that_have_to_be_made_all_fit_their_schemas(client, part):
    """A hundred in each part, at temperature 1."""
    draw, calls = numpy_generator(part, "testing/required-calls"), 0
    for number in range(4):
        schemas = {f"f{place}": drawn_object(draw) for place in range(int(draw.integers(1, 4)))}
        tools = [{"type": "function", "function": {"name": name, "parameters": schemas[name]}} for name in schemas]
        options = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "extra_body": QUIET}
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=25, temperature=1, seed=1000 * number, max_tokens=1500, **options
        )
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
            calls += 1
    assert calls == 100
