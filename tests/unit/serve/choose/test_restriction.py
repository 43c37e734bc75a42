"""Tokens that a request forbids, beside the definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.core.randomness import derive, uniforms
from penstock.models import hub
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.restriction import Restriction
from penstock.serve.choose.sampling import Grammar, SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.http.text import Tokens
from penstock.serve.messages import Delta, Finish, Request
from penstock.testing.reference import distribution, next_logits, pick
from penstock.testing.serve_model import small_model

VOCABULARY = 50
STOP = (7, 11)


def bad(text: list[int], token: int, words: list[list[int]]) -> bool:
    """Whether ``token`` behind ``text`` completes one of the ``words``."""
    return any([*text, token][-len(word) :] == word for word in words)


@given(
    st.none() | st.sets(st.integers(0, 69), min_size=1),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=4),
    st.lists(st.integers(0, 3), max_size=6),
    st.integers(0, 4),
    st.integers(0, 40),
)
def test_bits_are_cleared_of_tokens_that_may_not_come(allowed, words, text, least, more):
    sampling = SamplingParams(
        allowed_tokens=None if allowed is None else tuple(allowed), bad_words=tuple(map(tuple, words)), min_tokens=least
    )
    limits = Restriction(sampling, (2, 65), 70)
    row = np.full(limits.words + more // 32, -1, np.int32)
    row[0] &= ~(1 << 1)  # what another one forbids stays so
    recent = text[max(0, len(text) - limits.reach) :]
    limits.clear(row, len(text), recent)
    left = {bit for bit in range(32 * len(row)) if row[bit // 32] >> (bit % 32) & 1}
    wanted = {
        token
        for token in range(70)
        if (allowed is None or token in allowed)
        and not bad(text, token, words)
        and not (token in (2, 65) and len(text) < least)
    }
    assert left == wanted - {1}
    assert all(limits.refuses(token, len(text), recent) == (token not in wanted) for token in range(70))


def engine(draft: str | None = None, loop: str = "overlapped", grammars: Grammars | None = None) -> Engine:
    sizes = {"tokens": 24, "sequences": 8, "block_size": 4, "cache_tokens": 112}
    options = {"attention": Reference(), "loop": loop, "check": True, "draft": draft, **sizes}
    return build_engine(small_model(), EngineConfig.model_validate(options), frozenset(STOP), grammars=grammars)


def run(subject: Engine, requests: list[Request]) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {}
    for request in requests:
        subject.add(request)
        for delta in subject.step():
            found.setdefault(delta.id, []).append(delta)
    while subject.busy:
        for delta in subject.step():
            found.setdefault(delta.id, []).append(delta)
    return found


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def oracle(request: Request) -> list[int]:
    """The text by the definitions, from a forward pass over the whole of it for each token."""
    sampling, text = request.sampling, []
    words = [list(word) for word in sampling.bad_words]
    while len(text) < sampling.max_tokens:
        scores = next_logits(small_model(), [*request.prompt, *text]).double()
        for token in range(VOCABULARY):
            early = token in STOP and len(text) < sampling.min_tokens
            refused = sampling.allowed_tokens is not None and token not in sampling.allowed_tokens
            if early or refused or bad(text, token, words):
                scores[token] = -torch.inf
        uniform = float(uniforms(derive(sampling.seed, "sample"), np.array([len(text)]))[0])
        text.append(pick(distribution(scores, sampling), uniform))
        if text[-1] in STOP:
            break
    return text


def wishes(draw: random.Random, number: int) -> dict:
    # Words that the model would say: pieces of its own greedy texts.
    def word(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(length))

    allowed = tuple(draw.sample(range(VOCABULARY), 12))
    kinds: list[dict] = [
        {},
        {"allowed_tokens": allowed},
        {"allowed_tokens": (*allowed[:4], 7), "min_tokens": 5},
        {"bad_words": tuple(word(1) for _ in range(25))},
        {"bad_words": tuple((one, other) for one in allowed for other in range(0, VOCABULARY, 2))},
        {"bad_words": (word(1), *((one, one) for one in range(VOCABULARY))), "allowed_tokens": allowed, "logprobs": 1},
    ]
    return kinds[number % len(kinds)]


@pytest.mark.parametrize(("draft", "loop"), [(None, "overlapped"), (None, "plain"), ("ngram", "overlapped")])
def test_texts_are_those_of_the_definitions(draft, loop):
    draw = random.Random(3)
    requests = []
    for number in range(18):
        prompt = ([draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 6))] * 3)[: draw.randrange(2, 12)]
        sampling = SamplingParams(
            temperature=0.7 * (number // 6 % 2), max_tokens=18, seed=number, **wishes(draw, number)
        )
        requests.append(Request(str(number), prompt, sampling))
    found = run(engine(draft, loop), requests)
    for request in requests:
        assert tokens_of(found[request.id]) == oracle(request), request.sampling


def test_a_forbidden_token_has_the_log_probability_that_it_has():
    free = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    (first,) = run(engine(), [Request("free", [3, 4], free)])["free"]
    held = free.model_copy(update={"bad_words": ((first.tokens[0],),)})
    (second,) = run(engine(), [Request("held", [3, 4], held)])["held"]
    assert second.tokens != first.tokens
    assert second.logprobs[0].top == first.logprobs[0].top


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_tokens": (7,), "min_tokens": 2},
        {"allowed_tokens": (5,), "bad_words": ((5, 5, 5),)},
        {"bad_words": tuple((token,) for token in range(VOCABULARY))},
    ],
)
def test_a_text_for_which_no_token_is_left_ends_as_an_error(options):
    found = run(engine("ngram"), [Request("1", [3, 4], SamplingParams(temperature=0.5, max_tokens=9, **options))])["1"]
    assert found[-1].finish is Finish.ERROR
    assert tokens_of(found) == ([5, 5] if (5,) in options.values() else [])


def test_a_grammar_and_a_bad_word():
    tokens = hub.load_tokenizer("python-1m")
    vocabulary = len(tokens)
    bare = Tokens(tokens).bare
    limits = Restriction(SamplingParams(bad_words=("yes",)).tokenized(bare, bare), (), vocabulary)
    matcher = Grammars(tokens, vocabulary).start(Grammar(regex="yes|no"))
    row = np.zeros(matcher.words, np.int32)
    matcher.write_mask(row)
    before = row.copy()
    limits.clear(row, 0, [])
    gone = [token for token in range(vocabulary) if (before[token // 32] ^ row[token // 32]) >> (token % 32) & 1]
    assert gone == [word[0] for word in [bare("yes")] if len(word) == 1]


def test_words_are_refused_that_are_text_or_unknown():
    with pytest.raises(UsageError, match="tokenized"):
        engine().add(Request("1", [1], SamplingParams(bad_words=("no",))))
    for options in ({"bad_words": ((1, 50),)}, {"allowed_tokens": (50,)}):
        with pytest.raises(UsageError, match="outside of the vocabulary of 50"):
            engine().add(Request("1", [1], SamplingParams(**options)))


def test_a_word_stands_for_its_tokens_alone_and_behind_a_space():
    bare = Tokens(hub.load_tokenizer("python-1m")).bare
    made = SamplingParams(bad_words=("return", (1, 2))).tokenized(bare, bare)
    assert made.bad_words == (tuple(bare("return")), tuple(bare(" return")), (1, 2))
    assert made.bad_words[0] != made.bad_words[1]
