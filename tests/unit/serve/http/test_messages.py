"""Anthropic's messages, as the ``anthropic`` package meets them; the engine says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from in_process import Engine, asked, saying, serving, tokens_with_tools
from penstock.serve.http.app import make_app
from penstock.serve.http.service import Service
from penstock.serve.messages import Finish

if TYPE_CHECKING:
    import anthropic  # imported where it is used, as it takes seconds: processes with other tests need it not

THOUGHT = "<think>\nHm, the weather.\n</think>\n\n"
SAID = "Let me see."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL = {"name": "get_weather", "description": "The weather.", "input_schema": {"type": "object", "properties": {}}}
ASK = [{"role": "user", "content": "Weather?"}]


def with_client(
    service: Service, use: Callable[[anthropic.AsyncAnthropic], Awaitable[Any]], key: str = "k", keys: tuple = ()
) -> Any:
    import anthropic

    async def run() -> Any:
        transport = httpx2.ASGITransport(make_app(service, keys, False))
        async with httpx2.AsyncClient(transport=transport) as http:
            return await use(
                anthropic.AsyncAnthropic(base_url="http://localhost", api_key=key, http_client=http, max_retries=0)
            )

    return asyncio.run(run())


def told(service: Service, key: str = "k", keys: tuple = (), **options: Any) -> Any:
    """The message."""
    given = {"model": "m", "max_tokens": 99, "messages": ASK} | options
    return with_client(service, lambda client: client.messages.create(**given), key, keys)


def streamed(service: Service, **options: Any) -> tuple[list[Any], Any]:
    """The events of a stream, and what the client gathers of them."""

    async def use(client: anthropic.AsyncAnthropic) -> tuple[list[Any], Any]:
        given = {"model": "m", "max_tokens": 99, "messages": ASK} | options
        async with client.messages.stream(**given) as stream:
            events = [event async for event in stream]
            return events, await stream.get_final_message()

    return with_client(service, use)


def prompt(engine: Engine) -> str:
    return tokens_with_tools().decode(engine.requests[-1].prompt)


def test_a_message():
    answer = told(serving(engine := saying("Hello there")), system=[{"type": "text", "text": "Be short."}])
    assert [block.text for block in answer.content] == ["Hello there"]
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == ("assistant", "end_turn", None)
    assert prompt(engine).startswith("system: Be short.\nuser: Weather?\nassistant:")
    assert answer.usage.input_tokens == len(engine.requests[-1].prompt)
    assert answer.usage.output_tokens == len(tokens_with_tools().encode("Hello there", False)) + 1


@pytest.mark.parametrize("parts", [(SAID,), (THOUGHT, SAID), (THOUGHT, SAID, "\n", CALL), (CALL, "\n", CALL)])
@pytest.mark.parametrize("finish", [Finish.STOP, Finish.LENGTH])
def test_a_stream_is_the_whole_in_pieces(parts, finish):
    options = {"tools": [TOOL]}
    whole = told(serving(saying(*parts, finish=finish)), **options)
    events, gathered = streamed(serving(saying(*parts, finish=finish)), **options)
    assert [block.type for block in whole.content] == [block.type for block in gathered.content]
    for one, other in zip(whole.content, gathered.content, strict=True):
        left, right = one.to_dict(), other.to_dict()
        assert {**left, "id": None} == {**right, "id": None}
    assert gathered.stop_reason == whole.stop_reason
    assert gathered.usage.output_tokens == whole.usage.output_tokens
    wanted = "max_tokens" if finish is Finish.LENGTH else "tool_use" if CALL in parts else "end_turn"
    assert whole.stop_reason == wanted
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")


def test_thoughts_and_calls():
    answer = told(serving(saying(THOUGHT, SAID, "\n", CALL)), tools=[TOOL])
    thought, said, call = answer.content
    assert (thought.type, thought.thinking) == ("thinking", "Hm, the weather.")
    assert (said.type, said.text) == ("text", SAID)
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Köln"})


def test_a_call_that_is_cut_off_has_what_there_is():
    (call,) = told(serving(saying(CALL[: CALL.index("ln")], finish=Finish.LENGTH)), tools=[TOOL]).content
    assert call.type == "tool_use"
    assert call.input in ({}, {"city": "K"}, {"city": "Kö"})


def test_a_conversation_with_calls_and_results():
    service = serving(engine := saying("Sunny"))
    call = {"type": "tool_use", "id": "c", "name": "get_weather", "input": {"city": "Köln"}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "sunny"}]}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    messages = [
        *ASK,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    told(service, messages=messages, tools=[TOOL])
    text = prompt(engine)
    assert 'assistant: I look.<think>Hm.</think><tool_call>\n{"name": "get_weather", "arguments": ' in text
    assert text.endswith("tool: sunny\nuser: And?\nassistant:")


def test_what_is_asked_reaches_the_engine():
    import anthropic

    service = serving(engine := saying("Yes"))
    thinking = {"type": "adaptive"}
    told(
        service, max_tokens=1500, stop_sequences=["END"], thinking=thinking, extra_body={"temperature": 0.5, "top_k": 4}
    )
    sampling = engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.stop, sampling.temperature, sampling.top_k) == (1500, ("END",), 0.5, 4)
    assert prompt(engine).endswith("<think>\n")
    with pytest.raises(anthropic.BadRequestError, match="their tokens cannot be limited"):
        told(service, thinking={"type": "enabled", "budget_tokens": 1024})
    told(service, tools=[TOOL], tool_choice={"type": "tool", "name": "get_weather"})
    assert "get_weather" in engine.requests[-1].sampling.grammar.ebnf
    told(service, messages=[*ASK, {"role": "assistant", "content": "It is"}])
    assert prompt(engine).endswith("assistant: It is")


def test_a_stop_sequence_is_told():
    answer = told(serving(saying("One END two")), stop_sequences=["END"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("One ", "stop_sequence", "END")


def test_tokens_are_counted():
    service = serving(engine := saying("Yes"))
    told(service)
    counted = with_client(service, lambda client: client.messages.count_tokens(model="m", messages=ASK))
    assert counted.input_tokens == len(engine.requests[-1].prompt)


def test_keys_come_in_anthropics_header():
    import anthropic

    assert told(serving(saying("Yes")), "right", ("right",)).content[0].text == "Yes"
    with pytest.raises(anthropic.AuthenticationError, match="no valid API key"):
        told(serving(saying("Yes")), "wrong", ("right",))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": ASK}, "max_tokens"),
        ({"max_tokens": 0, "messages": ASK}, "max_tokens"),
        ({"max_tokens": 1, "messages": []}, "messages"),
        ({"max_tokens": 1, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0: blocks of the type 'image' are not supported",
        ),
        (
            {"max_tokens": 1, "messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": []}]}]},
            "messages.0.content.0: a tool_use needs a name",
        ),
        (
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]},
            "messages.0.content.0.content.0: blocks of the type 'none'",
        ),
        ({"max_tokens": 1, "messages": [{"role": "assistant", "content": []}]}, "needs a content"),
        ({"max_tokens": 1, "messages": ASK, "tool_choice": {"type": "any"}}, "there are no tools"),
        ({"max_tokens": 1, "messages": ASK, "tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"max_tokens": 1, "messages": ASK, "n": 2}, "n: Input should be 1"),
        (
            {"max_tokens": 9, "messages": ASK, "thinking": {"type": "enabled", "budget_tokens": -1}},
            "thinking.budget_tokens",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_anthropics_shape(body, message):
    answer = asked("/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert message in told["error"]["message"]


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    import anthropic

    class Failing(Engine):
        async def stream(self, *requests):
            async for delta in super().stream(*requests):
                yield delta
                raise RuntimeError("broken")

    service = serving(Failing(tokens_with_tools().encode("Hello there", False)))
    with pytest.raises(anthropic.APIStatusError, match="the server failed"):
        streamed(service)
