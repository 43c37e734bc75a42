"""OpenAI's responses, as the ``openai`` package meets them; the engine says what it is told to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest

from in_process import Engine, asked, saying, serving, tokens_with_tools
from penstock.serve.http.app import make_app
from penstock.serve.http.conversations import Conversations
from penstock.serve.http.errors import ApiError
from penstock.serve.http.protocol.responses import messages_of
from penstock.serve.http.service import Service
from penstock.serve.messages import Finish

THOUGHT = "<think>\nHm, the weather.\n</think>\n\n"
SAID = "Let me see."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}, "strict": False}


def talk(service: Service, *requests: dict[str, Any], keys: tuple[str, ...] = ()) -> list[Any]:
    """The responses to requests that follow each other, whole; or, of those that stream, all their events."""

    async def all_of_them() -> list[Any]:
        transport = httpx2.ASGITransport(make_app(service, keys, False))
        found: list[Any] = []
        async with httpx2.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key=keys[0] if keys else "none", http_client=http, max_retries=0
            )
            for request in requests:
                before = found[-1].id if found and request.pop("goes_on", False) else None
                told = request | ({"previous_response_id": before} if before else {})
                if (returned := told.pop("returned", None)) is not None:
                    told["input"] = [output(found[-1], returned)]
                answer = await client.responses.create(model="m", **told)
                found.append([event async for event in answer] if request.get("stream") else answer)
        return found

    return asyncio.run(all_of_them())


def output(answer: Any, returned: str) -> dict[str, Any]:
    """What the call in ``answer`` returned."""
    (call,) = [item for item in answer.output if item.type == "function_call"]
    return {"type": "function_call_output", "call_id": call.call_id, "output": returned}


def prompt(engine: Engine, number: int = -1) -> str:
    return tokens_with_tools().decode(engine.requests[number].prompt)


def test_a_text():
    (answer,) = talk(serving(saying("Hello", " there")), {"input": "Hi", "instructions": "Be short."})
    assert answer.output_text == "Hello there"
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "m")
    assert (answer.output[0].type, answer.output[0].role, answer.output[0].status) == (
        "message",
        "assistant",
        "completed",
    )
    assert answer.usage.output_tokens == len(tokens_with_tools().encode("Hello there", False)) + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_a_thought_a_text_and_a_call_are_items_of_their_own():
    service = serving(saying(THOUGHT, SAID, "\n", CALL))
    (answer,) = talk(service, {"input": "Weather?", "tools": [TOOL]})
    thought, said, call = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm, the weather.")
    assert (said.type, said.content[0].text) == ("message", SAID)
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Köln"})
    assert call.call_id.startswith("call_")
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens


@pytest.mark.parametrize("finish", [Finish.STOP, Finish.LENGTH])
@pytest.mark.parametrize("parts", [(SAID,), (THOUGHT, SAID), (THOUGHT, SAID, "\n", CALL), (CALL, "\n", CALL), ("",)])
def test_events_add_up_to_the_response(parts, finish):
    engine = saying(*parts, finish=finish) if parts != ("",) else Engine([0], Finish.STOP)
    (events,) = talk(serving(engine), {"input": "Weather?", "tools": [TOOL], "stream": True})
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    whole = events[-1].response
    assert events[-1].type == f"response.{whole.status}"
    items: dict[str, Any] = {}
    for event in events[2:-1]:
        if event.type == "response.output_item.added":
            assert event.output_index == len(items)
            items[event.item.id] = ["", None]
        elif event.type.endswith(".delta"):
            items[event.item_id][0] += event.delta
        elif event.type == "response.output_item.done":
            items[event.item.id][1] = event.item
    assert [item.id for item in whole.output] == list(items)
    for item in whole.output:
        written, done = items[item.id]
        assert done == item
        assert written == (item.arguments if item.type == "function_call" else item.content[0].text)
    if engine._finish is Finish.LENGTH:
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert whole.output[-1].status == "incomplete"


def test_the_openai_package_gathers_a_stream_itself():
    async def run() -> Any:
        transport = httpx2.ASGITransport(make_app(serving(saying(SAID, "\n", CALL)), [], False))
        async with httpx2.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
            async with client.responses.stream(model="m", input="Weather?", tools=[TOOL]) as stream:
                async for _ in stream:
                    pass
                return await stream.get_final_response()

    answer = asyncio.run(run())
    assert answer.output_text == SAID
    assert answer.output[1].name == "get_weather"


def test_a_response_goes_on_from_another():
    service = serving(engine := saying(THOUGHT, "Fine", "\n", CALL))
    first, second = talk(
        service,
        {"input": "Weather?", "instructions": "Be short.", "tools": [TOOL]},
        {
            "goes_on": True,
            "returned": "sunny",
            "tools": [TOOL],
        },
    )
    text = prompt(engine)
    assert second.previous_response_id == first.id
    assert "user: Weather?" in text and "tool: sunny" in text
    assert 'assistant: Fine<think>Hm, the weather.</think><tool_call>\n{"name": "get_weather"' in text
    assert "Be short." not in text  # instructions hold for one response


def test_what_is_sent_along_is_the_same_as_what_is_kept():
    service = serving(engine := saying(THOUGHT, "Fine", "\n", CALL))
    (first,) = talk(service, {"input": "Weather?", "tools": [TOOL]})
    result = output(first, "sunny")
    talk(service, {"input": [result], "tools": [TOOL], "previous_response_id": first.id})
    kept = prompt(engine)
    items = [item.to_dict() for item in first.output]
    talk(service, {"input": [{"role": "user", "content": "Weather?"}, *items, result], "tools": [TOOL]})
    assert prompt(engine) == kept


def test_a_response_is_kept_for_its_key_until_it_is_forgotten():
    service = serving(saying("Yes"))
    (answer,) = talk(service, {"input": "Hi"}, keys=("one", "other"))
    (loose,) = talk(service, {"input": "Hi", "store": False}, keys=("one",))
    with pytest.raises(openai.NotFoundError, match="is of another key"):
        talk(service, {"input": "So?", "previous_response_id": answer.id}, keys=("other", "one"))
    with pytest.raises(openai.NotFoundError, match="not stored"):
        talk(service, {"input": "So?", "previous_response_id": loose.id}, keys=("one",))

    async def retrieved() -> Any:
        transport = httpx2.ASGITransport(make_app(service, ["one"], False))
        async with httpx2.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="one", http_client=http)
            again = await client.responses.retrieve(answer.id)
            await client.responses.delete(answer.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(answer.id)
            return again

    assert asyncio.run(retrieved()).output_text == "Yes"


def test_the_oldest_responses_are_forgotten():
    kept = Conversations(most=3, largest=400)
    for number in range(5):
        kept.keep("", {"id": str(number)}, [], [])
    with pytest.raises(ApiError):
        kept.find("", "1")
    assert kept.find("", "2").record == {"id": "2"}
    kept.keep("", {"id": "large"}, [], [{"content": "x" * 500}])
    assert kept.find("", "large")
    with pytest.raises(ApiError):
        kept.find("", "4")
    for id in "abc":
        kept.keep("", {"id": id}, [], [])
    assert kept.find("", "a"), "what was forgotten takes no room"


def test_what_is_asked_reaches_the_engine():
    service = serving(engine := saying("Yes"))
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": True}}
    talk(
        service,
        {
            "input": "Hi",
            "text": form,
            "max_output_tokens": 7,
            "temperature": 0.5,
            "extra_body": {"seed": 3, "top_k": 5, "chat_template_kwargs": {"enable_thinking": True}},
        },
    )
    sampling = engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.top_k) == (7, 0.5, 3, 5)
    assert sampling.grammar.json_schema == '{"type": "integer"}'
    assert prompt(engine).endswith("<think>\n")
    talk(service, {"input": "Hi", "tools": [TOOL], "tool_choice": {"type": "function", "name": "get_weather"}})
    assert "get_weather" in engine.requests[-1].sampling.grammar.ebnf


def test_items_become_messages():
    def said(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}

    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    found = messages_of(
        [
            said("developer", "d"),
            said("user", "u"),
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            call,
            call | {"call_id": "2"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "r"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}], "summary": []},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
        ]
    )
    assert [message["role"] for message in found] == ["developer", "user", "assistant", "tool", "assistant"]
    assert [each["id"] for each in found[2]["tool_calls"]] == ["1", "2"]
    assert (found[2]["reasoning_content"], found[4]["reasoning_content"]) == ("hm", "so")
    assert found[3]["content"] == [{"type": "text", "text": "r"}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "item 1 of the input is of the type 'computer_call'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "item 1 of the input needs the field 'arguments'"),
        (
            {"input": [{"type": "function_call_output", "call_id": "call_9", "output": "x"}]},
            "function_call_output of 'call_9', and no function call before it",
        ),
        ({"input": [{"role": "user"}]}, "needs a content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "images are not supported"),
        ({"input": [{"role": 1, "content": "x"}]}, "needs the field 'role', a text"),
        ({"input": "x", "background": True}, "background is not supported"),
        ({"input": "x", "conversation": "c"}, "conversation is not supported"),
        ({"input": "x", "n": 2}, "n: Input should be 1"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tool 1 is no function"),
        ({"input": "x", "tool_choice": "required"}, "there are no tools"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "there are no tools"),
        ({"input": "x", "tool_choice": {"type": "x"}}, "tool_choice"),
        ({"input": "x", "temperature": "hot"}, "temperature"),
    ],
)
def test_what_cannot_be_done_is_said(body, message):
    answer = asked("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_unknown_fields_are_named():
    answer = asked("/v1/responses", json={"input": "x", "max_tool_cals": 1, "text": {"formt": 1}})
    assert answer.headers["penstock-ignored"] == "max_tool_cals, text.formt"
    refused = asked("/v1/responses", strict=True, json={"input": "x", "max_tool_cals": 1})
    assert "did you mean 'max_tool_calls'" in refused.json()["error"]["message"]


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    class Failing(Engine):
        async def stream(self, *requests):
            async for delta in super().stream(*requests):
                yield delta
                raise RuntimeError("broken")

    service = serving(Failing(tokens_with_tools().encode("Hello there", False)))
    (events,) = talk(service, {"input": "Hi", "stream": True})
    assert events[-1].type == "error"
    assert "the server failed" in events[-1].message
