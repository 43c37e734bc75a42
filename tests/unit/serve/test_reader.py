"""One continuation's deltas as text, however its tokens are dealt out, against decoding them as a whole."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.models import hub
from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.reader import Reader, Reading

TOKENIZER = hub.load_tokenizer("python-1m")
PROMPT = TOKENIZER("def name(")["input_ids"]
WHOLE = "self, naïve):\n    return [🙂, self.naïve]\n\nclass"
TOKENS = TOKENIZER(WHOLE)["input_ids"]
END = TOKENIZER.eos_token_id


def deltas(tokens: list[int], sizes: list[int], finish: Finish) -> list[Delta]:
    """``tokens`` dealt out in groups of ``sizes``, the rest in the last one, which ends."""
    cuts = [min(sum(sizes[:place]), len(tokens)) for place in range(len(sizes) + 1)] + [len(tokens)]
    groups = [tokens[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]
    return [
        Delta(
            "a", 0, group, LogprobRows.of(TokenLogprobs(t, -1.0, 1, []) for t in group), None, finish if last else None
        )
        for group, last in zip(groups, [False] * (len(groups) - 1) + [True], strict=True)
    ]


def read(sampling: SamplingParams, news: list[Delta]) -> tuple[str, list[int], Reading]:
    """Text, tokens and the last reading; what comes behind the end is not read."""
    reader = Reader(Request("a", PROMPT, sampling), TOKENIZER.backend_tokenizer)
    readings = [reader.read(delta) for delta in news if reader.finish is None]
    tokens = [token for reading in readings for token in reading.tokens]
    assert tokens == [each.token for reading in readings for each in reading.logprobs]
    return "".join(reading.text for reading in readings), tokens, readings[-1]


SIZES = st.lists(st.integers(1, 7), max_size=12)
STOPS = [(), ("naïve",), ("\n    ret",), ("[🙂",), ("zzz", "]"), ("class",), (":\n", "e):")]


@given(SIZES, st.sampled_from(STOPS))
def test_the_text_up_to_the_first_stop_string(sizes, stop):
    text, tokens, last = read(SamplingParams(stop=stop), deltas(TOKENS, sizes, Finish.LENGTH))
    found = sorted((WHOLE.index(each), each) for each in stop if each in WHOLE)
    if not found:
        assert (text, tokens, last.finish, last.stopped, last.early) == (WHOLE, TOKENS, Finish.LENGTH, None, False)
        return
    assert text == WHOLE[: found[0][0]]
    assert (last.finish, last.stopped) == (Finish.STOP, found[0][1])
    needed = next(n for n in range(len(TOKENS) + 1) if any(s in TOKENIZER.decode(TOKENS[:n]) for s in stop))
    assert tokens == TOKENS[:needed]
    # Only where the engine does not end by itself must it be told.
    assert last.early == (needed <= sum(map(len, [d.tokens for d in deltas(TOKENS, sizes, Finish.LENGTH)[:-1]])))


@given(SIZES)
def test_a_stop_token_is_told_and_not_shown(sizes):
    for ends, own in ((END, None), (TOKENS[-1], TOKENS[-1])):
        tokens = [*TOKENS[:-1], ends]
        news = deltas(tokens, sizes, Finish.STOP)
        text, told, last = read(SamplingParams(stop_tokens=(TOKENS[-1],)), news)
        assert text == TOKENIZER.decode(TOKENS[:-1])
        assert (told, last.shown, last.stopped) == (tokens, last.tokens[:-1], own)


@given(SIZES)
def test_a_stop_string_before_a_stop_token_of_the_same_delta(sizes):
    text, tokens, last = read(SamplingParams(stop=("naïve]",)), deltas([*TOKENS, END], sizes, Finish.STOP))
    assert text == WHOLE[: WHOLE.index("naïve]")]
    assert (last.stopped, END in tokens) == ("naïve]", False)


@pytest.mark.parametrize("finish", [Finish.ABORT, Finish.DEADLINE, Finish.ERROR])
def test_an_end_without_tokens_gives_what_was_held_back(finish):
    sampling = SamplingParams(stop=("classy",))
    news = [*deltas(TOKENS, [], Finish.LENGTH), Delta("a", 0, [], finish=finish)]
    news[0] = Delta("a", 0, TOKENS)
    reader = Reader(Request("a", PROMPT, sampling), TOKENIZER.backend_tokenizer)
    first, last = (reader.read(delta) for delta in news)
    assert (first.text, first.finish) == (WHOLE.removesuffix("class"), None)
    assert (last.text, last.finish, last.tokens, last.early) == ("class", finish, [], False)


def test_too_early_a_stop_string_is_text():
    text, _, last = read(SamplingParams(stop=("self",), min_tokens=3), deltas(TOKENS, [], Finish.LENGTH))
    assert text == WHOLE[: WHOLE.rindex("self")]
    assert last.stopped == "self"
