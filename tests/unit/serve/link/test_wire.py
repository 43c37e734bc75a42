"""Messages between processes arrive as they were sent."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.channel import HEADER, framed, length
from penstock.core.events import Event
from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.link import wire
from penstock.serve.messages import Abort, Act, Control, Delta, Embed, Finish, Request, Vectors

NUMBERS = st.floats(allow_nan=False)
TOKENS = st.integers(0, 2**31 - 1)
LOGPROBS = st.floats(max_value=0, width=32, allow_nan=False)


@st.composite
def scores(draw: st.DrawFn) -> LogprobRows:
    most = draw(st.integers(0, 3))
    top = st.lists(st.tuples(TOKENS, LOGPROBS), min_size=most, max_size=most)
    return LogprobRows.of(draw(st.lists(st.builds(TokenLogprobs, TOKENS, LOGPROBS, TOKENS, top), max_size=3)))


DELTAS = st.builds(
    Delta,
    st.text(),
    TOKENS,
    st.lists(TOKENS, max_size=5),
    st.none() | scores(),
    st.none() | scores(),
    st.none() | st.sampled_from(Finish),
    TOKENS,
)
EVENTS = st.builds(
    Event,
    NUMBERS,
    st.text(),
    st.text(),
    TOKENS,
    st.dictionaries(st.text(), TOKENS | st.floats(allow_nan=False) | st.text()),
)
REQUESTS = st.builds(
    Request,
    st.text(),
    st.lists(TOKENS, max_size=5),
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        seed=st.integers(-(2**62), 2**62 - 1),
        n=st.integers(1, 128),
        stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
        logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3),
        grammar=st.none() | st.sampled_from([{"json_object": True}, {"regex": "a+"}]),
        rule=st.none() | st.sampled_from(["fire", {"name": "fire"}]),
    ),
    st.integers(0, 1000),
    st.text(),
    st.none() | st.floats(0, 1e6),
)
MESSAGES = st.one_of(
    REQUESTS,
    st.builds(Abort, st.text(), st.none() | TOKENS),
    st.builds(wire.News, st.lists(DELTAS, max_size=3), st.none(), st.lists(EVENTS, max_size=3)),
    st.builds(wire.Refused, st.text(), st.text()),
    st.builds(wire.Open, st.text(), st.text(), st.text()),
    st.builds(
        wire.Ready, TOKENS, TOKENS, TOKENS, st.lists(st.dictionaries(st.text(), st.integers(0, 2**50)), max_size=2)
    ),
    st.builds(Control, st.text(), st.sampled_from(Act), st.text(), st.none() | TOKENS),
    st.builds(Embed, st.text(), st.lists(st.lists(TOKENS))),
    st.builds(Vectors, st.text(), st.lists(TOKENS), st.binary()),
)


@given(MESSAGES)
def test_a_message_comes_out_as_it_went_in(message):
    whole = framed(wire.body(message))
    head, body = whole[: HEADER.size], whole[HEADER.size :]
    assert length(head) == len(body)
    assert wire.parse(body) == message


def test_an_impossible_token_arrives_too():
    told = LogprobRows.of([TokenLogprobs(1, -math.inf, 9, [(0, -math.inf)])])
    message = wire.News([Delta("a", 0, [1], told)])
    assert wire.parse(wire.body(message)) == message


def test_nothing_else_can_be_sent():
    with pytest.raises(NotImplementedError, match="object cannot travel"):
        wire.body(wire.Refused("a", object()))
