"""Grammars: what is let through, what is refused, and at what cost."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest
import torch

import effort
from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.grammar import Grammars, Matcher
from penstock.serve.choose.sampling import Grammar, SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Finish, Request

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALL = r"[a-z_]{1,8}\((\d{1,3}(, \d{1,3}){0,2})?\)"
NESTED = 'start: "(" start ")" | "x"'


@pytest.fixture(scope="module")
def tokenizer():
    return hub.load_tokenizer("python-1m")


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def model() -> Decoder:
    return hub.load("python-1m", dtype=torch.float32).eval()


def engine(model: Decoder, tokenizer, grammars: Grammars | None, loop: str = "overlapped") -> Engine:
    sizes = {"tokens": 64, "sequences": 16, "block_size": 4, "cache_tokens": 2000}
    config = EngineConfig.model_validate({"attention": Reference(), "loop": loop, "check": True, **sizes})
    return build_engine(model, config, frozenset({tokenizer.eos_token_id}), grammars=grammars)


def mask_of(matcher: Matcher) -> np.ndarray:
    row = np.zeros(matcher.words, np.int32)
    matcher.write_mask(row)
    return row


def allowed(matcher: Matcher, size: int) -> list[int]:
    bits = np.unpackbits(mask_of(matcher).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:size]).tolist()


@pytest.mark.parametrize("loop", ["plain", "overlapped"])
def test_what_an_engine_writes_obeys_its_grammar(model, tokenizer, grammars, loop):
    given = {
        "person": Grammar(json_schema=PERSON),
        "call": Grammar(regex=CALL),
        "nested": Grammar(ebnf=NESTED),
        "gbnf": Grammar(ebnf='root ::= ("yes" | "no") [0-9]'),
        "free": None,
    }
    subject, prompt = engine(model, tokenizer, grammars, loop), tokenizer("def f(")["input_ids"]
    found: dict[str, list[int]] = {}
    ends: dict[str, Finish | None] = {}
    for seed in range(4):
        for name, grammar in given.items():
            # An end-of-text that the request wants ignored still ends what a grammar says is whole.
            sampling = SamplingParams(seed=seed, max_tokens=120, grammar=grammar, ignore_eos=seed % 2 == 0)
            subject.add(Request(f"{name} {seed}", prompt, sampling))
            found[f"{name} {seed}"] = []
    while subject.busy:
        for delta in subject.step():
            found[delta.id] += delta.tokens
            ends[delta.id] = delta.finish
    assert subject.memory.pool.held == 0
    texts = {
        id: tokenizer.decode(tokens, skip_special_tokens=True)
        for id, tokens in found.items()
        if ends[id] is Finish.STOP
    }
    assert sum(not id.startswith("free") for id in texts) >= 14, "nearly all of the 16 come to their end"
    for id, text in texts.items():
        name = id.split()[0]
        if name == "person":
            jsonschema.validate(json.loads(text), PERSON)
        elif name == "call":
            assert re.fullmatch(CALL, text)
        elif name == "nested":
            assert re.fullmatch(r"(\(*)x(\)*)", text) and text.count("(") == text.count(")")
        elif name == "gbnf":
            assert re.fullmatch("(yes|no)[0-9]", text)
    assert len({text for id, text in texts.items() if id.startswith("person")}) > 1


def test_random_walks_through_any_json_object_parse(tokenizer, grammars):
    draw = random.Random(0)
    for _ in range(8):
        matcher, tokens = grammars.start(Grammar(json_object=True)), []
        while len(tokens) < 400:
            choices = allowed(matcher, len(tokenizer))
            assert choices and not matcher.failed
            if tokenizer.eos_token_id in choices:
                break
            # What closes is taken more often, so that the walk ends.
            closing = [token for token in choices if set(tokenizer.decode([token])) <= set('"}]')]
            token = draw.choice(closing if closing and draw.random() < 0.5 else choices)
            tokens.append(token)
            matcher.consume(token)
        else:
            continue
        assert isinstance(json.loads(tokenizer.decode(tokens)), dict)


def test_a_mask_allows_exactly_what_can_go_on(tokenizer, grammars):
    """Against the definition: a token may come if the text with it is a beginning of a match."""
    matcher = grammars.start(Grammar(regex="(abc|abd)+x?"))
    end = tokenizer.eos_token_id
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    wanted = [
        t for t, text in enumerate(texts) if t != end and re.fullmatch("(ab[cd])*(a|ab|ab[cd]x?)?", text) and text
    ]
    assert allowed(matcher, len(tokenizer)) == wanted
    for token in tokenizer("abc")["input_ids"]:
        matcher.consume(token)
    assert end in allowed(matcher, len(tokenizer))


def test_continuations_do_not_share_their_place(tokenizer, grammars):
    one, two = (grammars.start(Grammar(regex="ab")) for _ in range(2))
    before = allowed(two, len(tokenizer))
    one.consume(before[0])
    assert allowed(two, len(tokenizer)) == before


@pytest.mark.parametrize("regex", ["ab[0-9]{6}cd", "ab[0-9]{2,6}(cd)*", "(ab[0-9]*cd)?"])
def test_going_back_leads_to_where_it_was_also_from_behind_the_end(tokenizer, grammars, regex):
    """Whether the grammar ends by itself or by an end of text, and of a copy as of the original."""
    fresh, tokens = grammars.start(Grammar(regex=regex)), tokenizer("ab080808cd")["input_ids"]
    steps = [*tokens, tokenizer.eos_token_id, tokenizer.eos_token_id]
    whole = fresh.copy()
    for token in steps:
        whole.consume(token)
    for back in range(2, len(steps) + 1):
        place, wanted = whole.copy(), fresh.copy()
        place.rollback(1)
        place.rollback(back - 1)
        for token in steps[: len(steps) - back]:
            wanted.consume(token)
        left = steps[len(steps) - back :]
        assert place.allowed(left[:-2]) == len(left[:-2])
        np.testing.assert_array_equal(mask_of(place), mask_of(wanted))
        for token in left:
            place.consume(token)
        assert not place.failed


def test_a_model_with_more_scores_than_its_tokenizer_has_tokens(tokenizer):
    padded = Grammars(tokenizer, len(tokenizer) + 100, [tokenizer.eos_token_id])
    row = mask_of(padded.start(Grammar(regex="a+")))
    assert row.shape == (-(-(len(tokenizer) + 100) // 32),)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert not bits[len(tokenizer) :].any()


def test_an_end_that_the_tokenizer_does_not_have_is_none(tokenizer):
    """Configurations name such; a text that is over has the others."""
    ends = [-1, tokenizer.eos_token_id, len(tokenizer) + 10, 10**9]
    for grammars in (Grammars(tokenizer, len(tokenizer) + 100, ends), Grammars(tokenizer, len(tokenizer), [10**9])):
        place = grammars.start(Grammar(regex="a"))
        place.consume(tokenizer.convert_tokens_to_ids("a"))
        bits = np.unpackbits(mask_of(place).view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == [tokenizer.eos_token_id]


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


REFUSED = {
    "unclosed group": Grammar(regex="(a"),
    "look-ahead": Grammar(regex="(?=a)b"),
    "deep regex": Grammar(regex="(" * 20_000 + "a" + ")" * 20_000),
    "not json": Grammar(json_schema="{"),
    "not a schema": Grammar(json_schema='{"type": "objekt"}'),
    "unknown keyword": Grammar(json_schema={"type": "array", "uniqueItems": True, "contains": {"type": "integer"}}),
    "remote reference": Grammar(json_schema={"$ref": "http://example.org/schema"}),
    "deep schema": Grammar(json_schema=deep(300)),
    "product of choices": Grammar(
        json_schema={
            "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(10)]} for i in range(10)]
        }
    ),
    "large prime": Grammar(json_schema={"type": "integer", "multipleOf": 10**9 + 7}),
    "unknown rule": Grammar(ebnf="start: nothing"),
    "deep rule": Grammar(ebnf="start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "doubling terminals": Grammar(
        ebnf="start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(30)) + 'R30: "a"'
    ),
    "broken gbnf": Grammar(ebnf='root ::= "a'),
    "deep gbnf": Grammar(ebnf="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_and_exploding_grammars_are_refused_soon(grammars, name):
    def work() -> None:
        with pytest.raises(UsageError, match=r"the grammar cannot be used: .{3,300}"):
            grammars.start(REFUSED[name])

    assert effort.loops(work) < 50


HEAVY = {
    "doubling rules": Grammar(
        ebnf="start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"'
    ),
    "repeated repeats": Grammar(regex="((a{1,1000}){1,1000}){1,1000}"),
    "exponential automaton": Grammar(regex="(a|b)*a(a|b){24}"),
    "many properties": Grammar(
        json_schema={"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1500)}}
    ),
    "long arrays": Grammar(json_schema={"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "rule of itself": Grammar(ebnf='start: start start | "a" |'),
}


@pytest.mark.parametrize("name", HEAVY)
def test_no_step_of_a_heavy_grammar_takes_long(grammars, tokenizer, name):
    """What compiles can still be heavy at work: it goes on in little time, or fails and says so."""
    draw = random.Random(0)

    def work() -> None:
        matcher = grammars.start(HEAVY[name])
        for _ in range(40):
            choices = allowed(matcher, len(tokenizer))
            if matcher.failed or choices == [tokenizer.eos_token_id]:
                break
            matcher.consume(draw.choice(choices))

    assert effort.loops(work) < 100


def test_a_grammar_that_fails_on_the_way_ends_its_request_as_an_error(model, tokenizer, grammars):
    subject = engine(model, tokenizer, grammars)
    sampling = SamplingParams(temperature=0, max_tokens=50, grammar=HEAVY["doubling rules"])
    try:
        subject.add(Request("1", [5, 6], sampling))
    except UsageError:
        pytest.skip("refused at once, which is better")
    deltas = []
    while subject.busy:
        deltas += subject.step()
    assert deltas[-1].finish is Finish.ERROR and subject.memory.pool.held == 0
    assert all(0 <= token < len(tokenizer) for delta in deltas for token in delta.tokens)


def test_an_engine_without_tokenizer_serves_no_grammar(model, tokenizer):
    with pytest.raises(UsageError, match="serves no grammars"):
        engine(model, tokenizer, None).add(Request("1", [5], SamplingParams(grammar=Grammar(regex="a"))))


def test_a_refused_grammar_leaves_nothing_behind(model, tokenizer, grammars):
    subject = engine(model, tokenizer, grammars)
    with pytest.raises(UsageError, match="the grammar cannot be used"):
        subject.add(Request("1", [5], SamplingParams(grammar=Grammar(regex="("))))
    assert not subject.busy
    subject.add(Request("1", [5], SamplingParams(max_tokens=1)))
