"""What a request may ask for, and what is refused before it costs anything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.serve.choose.sampling import Grammar, SamplingParams, best
from penstock.serve.decode.momentum import Momentum

FULL = SamplingParams(
    temperature=0.0,
    n=2,
    best_of=4,
    presence_penalty=0.5,
    frequency_penalty=-0.25,
    repetition_penalty=1.2,
    logit_bias={3: -1.5, 700: 100},
    stop=("\n\n", "END"),
    stop_tokens=(5, 6),
    allowed_tokens=(5, 6, 7),
    bad_words=("never", (1, 2)),
    logprobs=3,
    prompt_logprobs=0,
    grammar=Grammar(json_schema={"type": "object"}),
    rule=Momentum(alpha=0.5),
)


def test_it_travels_as_json():
    assert SamplingParams.model_validate_json(FULL.model_dump_json()) == FULL
    assert SamplingParams.model_validate(FULL.model_dump(mode="json", exclude_defaults=True)) == FULL


def test_short_forms():
    assert SamplingParams(stop="END").stop == ("END",)
    given = SamplingParams.model_validate({"temperature": 0, "rule": "momentum", "logit_bias": {"7": 1}})
    assert given.rule == Momentum() and given.logit_bias == {7: 1.0}
    assert Grammar(json_schema='{"type":"object"}').json_schema == '{"type":"object"}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.nan}, "finite"),
        ({"temperature": 1e300}, "temperature: .* 100"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 10**30}, "top_k"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"n": 10**9}, "n: .* 128"),
        ({"n": 3, "best_of": 2}, r"best_of \(2\) cannot be less than n \(3\)"),
        ({"presence_penalty": 2.5}, "presence_penalty: .* 2"),
        ({"frequency_penalty": math.inf}, "frequency_penalty: .* finite"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 1e9}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: .* 1024"),
        ({"min_tokens": 300}, r"min_tokens \(300\) cannot be more than max_tokens \(256\)"),
        ({"stop": ""}, "a stop string has 1 to 256 characters"),
        ({"stop": ["x" * 257]}, "a stop string has 1 to 256 characters"),
        ({"stop": ["x"] * 17}, "stop: .* 16"),
        ({"stop_tokens": [-1]}, "stop_tokens"),
        ({"allowed_tokens": []}, "allowed_tokens"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x" * 257]}, "bad_words"),
        ({"logprobs": 21}, "logprobs: .* 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"grammar": {}}, "exactly one of json_schema, regex, ebnf and json_object, not none of them"),
        ({"grammar": {"regex": "a", "json_object": True}}, "not regex and json_object"),
        ({"grammar": {"regex": ""}}, "grammar.regex"),
        ({"grammar": {"regex": "a" * 70_000}}, "grammar.regex: .* 65536"),
        ({"grammar": {"json_schema": {"minimum": math.nan}}}, "grammar.json_schema: this is not JSON"),
        ({"grammar": {"json_object": True}, "min_tokens": 1}, "min_tokens does not go with a grammar"),
        ({"rule": "momentum"}, "set temperature to 0"),
        ({"rule": "nothing"}, "decode.rule has no policy 'nothing'"),
        ({"top_q": 1}, "top_q: unknown key"),
    ],
)
def test_what_is_out_of_bounds_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build(SamplingParams, options, "the request")


def test_a_bottomless_schema_is_refused():
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ConfigError, match="this is not JSON"):
        build(Grammar, {"json_schema": schema}, "the grammar")


@given(st.lists(st.lists(st.floats(-20, 0), max_size=5), min_size=1, max_size=6), st.integers(1, 6))
def test_the_best_have_the_highest_mean(logprobs, n):
    def mean(values):
        return sum(values) / len(values) if values else -math.inf

    chosen = best(logprobs, n)
    assert len(set(chosen)) == len(chosen) == min(n, len(logprobs))
    worst = min(mean(logprobs[index]) for index in chosen)
    assert all(mean(values) <= worst + 1e-12 for index, values in enumerate(logprobs) if index not in chosen)
    assert sorted(chosen, key=lambda index: -mean(logprobs[index])) == chosen
