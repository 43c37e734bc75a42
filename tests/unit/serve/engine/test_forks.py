"""Sequences that are forked, cut back and fed: their grammar, penalties and counts go with them."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.sampling import Grammar, SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.engine.pairs import END, PAIRS, grammars, may_follow
from penstock.testing.reference import continued, prompt_logprobs
from penstock.testing.serve_model import small_model

SIZES = {"tokens": 64, "sequences": 8, "block_size": 4, "cache_tokens": 600, "check": True}
PATTERN = r"ab[0-9]{6}cd"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return hub.load_tokenizer("python-1m")


@pytest.fixture(params=["plain", "overlapped"])
def writer(tokenizer, request) -> Engine:
    """An engine with a real tokenizer and grammars."""
    model = hub.load("python-1m", dtype=torch.float32).eval()
    ends = frozenset({tokenizer.eos_token_id})
    config = EngineConfig.model_validate({"attention": Reference(), "loop": request.param, **SIZES})
    return build_engine(model, config, ends, grammars=Grammars(tokenizer, len(tokenizer), ends))


@pytest.fixture(params=["plain", "overlapped"])
def engine(request) -> Engine:
    config = EngineConfig.model_validate({"attention": Reference(), "loop": request.param, **SIZES})
    return build_engine(small_model(), config, frozenset({7}))


def finish(engine: Engine) -> dict[tuple[str, int], list[int]]:
    told: dict[tuple[str, int], list[int]] = {}
    while engine.busy:
        for delta in engine.step():
            told.setdefault((delta.id, delta.index), []).extend(delta.tokens)
    return told


def test_a_fork_goes_on_in_its_parents_grammar(writer, tokenizer):
    prompt, grammar = tokenizer("x = ")["input_ids"], Grammar(regex=PATTERN)
    asked = SamplingParams(grammar=grammar, max_tokens=30, n=2)
    writer.add(Request("parent", prompt, asked))
    told: dict[int, list[int]] = {0: [], 1: []}
    while min(map(len, told.values())) < 3:
        for delta in writer.step():
            told[delta.index] += delta.tokens
    for index in (0, 1):
        text = prompt + told[index][:3]
        writer.fork("parent", Request(f"child {index}", text, SamplingParams(grammar=grammar, seed=9)), index)
    found = finish(writer)
    for index in (0, 1):
        whole = tokenizer.decode([*told[index][:3], *found[f"child {index}", 0][:-1]])
        assert re.fullmatch(PATTERN, whole), whole


def test_a_fork_of_one_that_ended_and_was_kept_goes_on_in_its_grammar_from_anywhere(writer, tokenizer):
    prompt, grammar = tokenizer("x = ")["input_ids"], Grammar(regex=PATTERN)
    asked = SamplingParams(grammar=grammar, max_tokens=30, seed=3)
    writer.add(Request("parent", prompt, asked, keep=True))
    told = finish(writer)["parent", 0]
    assert told[-1] == tokenizer.eos_token_id, "it ends by an end of text"
    for length in range(len(told)):
        text = prompt + told[:length]
        writer.fork("parent", Request(str(length), text, asked.model_copy(update={"seed": length})))
    other = tokenizer("ab90" if "ab1" in tokenizer.decode(told) else "ab10")["input_ids"]
    writer.fork("parent", Request("another way", prompt + other, asked))
    found = finish(writer)
    whole = tokenizer.decode([*other, *found["another way", 0][:-1]])
    assert re.fullmatch(PATTERN, whole), whole
    for length in range(len(told)):
        whole = tokenizer.decode([*told[:length], *found[str(length), 0][:-1]])
        assert re.fullmatch(PATTERN, whole), whole


@pytest.mark.parametrize("loop", ["plain", "overlapped"])
def test_a_grammar_begins_anew_where_none_of_its_text_is_left(loop):
    """Its text begins behind what the parent said, of which some is taken back, too: by a cut, and by another fork."""
    config = EngineConfig.model_validate({"attention": Reference(), "loop": loop, **SIZES})
    engine = build_engine(small_model(), config, frozenset({END}), grammars=grammars())
    greedy = {"temperature": 0, "ignore_eos": True}
    engine.add(Request("parent", [3, 1, 4, 1, 5], SamplingParams(max_tokens=40, **greedy)))
    for _ in range(10):
        engine.step()
    text = list(engine.requests.parent("parent", 0).tokens)
    engine.fork("parent", Request("child", text, SamplingParams(max_tokens=30, grammar=PAIRS, **greedy)))
    engine.step()
    short, asked = text[:-4], SamplingParams(max_tokens=30, grammar=PAIRS, **greedy)
    engine.fork("child", Request("other", short, asked))
    engine.truncate("child", len(short))
    engine.abort("parent")
    told = finish(engine)
    first = [token for token in told["other", 0] if token != END]
    assert len(first) > 1 and told["child", 0][-len(told["other", 0]) :] == told["other", 0]
    for place, token in enumerate(told["other", 0]):
        assert may_follow(told["other", 0][:place], token)


def test_what_is_fed_must_be_in_the_grammar_and_what_is_cut_can_be_written_anew(writer, tokenizer):
    prompt = tokenizer("x = ")["input_ids"]
    writer.add(Request("1", prompt, SamplingParams(grammar=Grammar(regex=PATTERN), max_tokens=30)))
    writer.step()
    writer.truncate("1", len(prompt))
    with pytest.raises(UsageError, match="grammar"):
        writer.feed("1", tokenizer("zz")["input_ids"])
    writer.feed("1", tokenizer("ab12")["input_ids"])
    rest = [token for delta in run_out(writer) for token in delta.tokens]
    text = "ab12" + tokenizer.decode(rest[:-1])
    assert re.fullmatch(PATTERN, text), text


def run_out(engine: Engine) -> list:
    """All that is said from here on, without what was under way."""
    engine._untold.clear()
    deltas = []
    while engine.busy:
        deltas += engine.step()
    return deltas


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.8},
    ],
)
def test_a_fork_with_the_parents_seed_says_what_the_parent_says(engine, options):
    asked = SamplingParams(max_tokens=14, seed=3, ignore_eos=True, **options)
    engine.add(Request("parent", [1, 2, 3], asked))
    told: list[int] = []
    while len(told) < 5:
        told += [token for delta in engine.step() for token in delta.tokens]
    engine.fork("parent", Request("child", [1, 2, 3, *told[:4]], asked.model_copy(update={"max_tokens": 10})))
    found = finish(engine)
    assert told[:4] + found["child", 0] == told + found["parent", 0]
    assert told[:4] + found["child", 0] == continued(small_model(), [1, 2, 3], 3, asked)


def test_penalties_and_min_tokens_count_what_the_parent_generated(engine):
    """The parent's tokens are charged as generated, and count towards the least."""
    asked = SamplingParams(temperature=0, max_tokens=16, frequency_penalty=1.5, repetition_penalty=1.3, min_tokens=8)
    engine.add(Request("parent", [1, 2, 3], asked))
    told: list[int] = []
    while len(told) < 6:
        told += [token for delta in engine.step() for token in delta.tokens]
    engine.fork("parent", Request("child", [1, 2, 3, *told[:6]], asked.model_copy(update={"max_tokens": 10})))
    found = finish(engine)
    assert told[:6] + found["child", 0] == told + found["parent", 0]


def test_penalties_follow_what_is_cut_and_fed(engine):
    """Cut back and fed its own tokens, a sequence goes on as if nothing had been done."""
    asked = SamplingParams(temperature=0, max_tokens=16, presence_penalty=1.0, frequency_penalty=0.7, ignore_eos=True)
    engine.add(Request("plain", [1, 2, 3], asked))
    wanted = finish(engine)["plain", 0]
    engine.add(Request("1", [1, 2, 3], asked))
    for _ in range(7):
        engine.step()
    engine.events.fresh()
    engine.truncate("1", 5)
    gone = engine.events.fresh()[-1]
    assert (gone.kind, gone.id, gone.detail["left"]) == ("truncated", "1", 5)
    assert gone.detail["tokens"] >= 3
    engine.feed("1", wanted[2:4])
    (fed,) = engine.events.fresh()
    assert (fed.kind, fed.id, fed.detail) == ("fed", "1", {"tokens": 2})
    assert [token for delta in run_out(engine) for token in delta.tokens] == wanted[4:]


def test_growing_prefixes_are_rated_once(engine):
    """Ten texts, each four tokens longer than the one before: what was rated is not computed again."""
    text = [(7 * place) % 50 for place in range(1, 41)]
    wanted, found = prompt_logprobs(small_model(), text), []
    launch, computed = engine.executor.launch, []
    engine.executor.launch = lambda batch: (computed.append(batch.tokens), launch(batch))[1]
    for length in range(4, 41, 4):
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=max(1, length - 4))
        engine.add(Request(str(length), text[:length], asked))
        while engine.busy:
            for delta in engine.step():
                found += [each.logprob for each in delta.prompt_logprobs or []]
    assert found == pytest.approx(wanted, abs=1e-4)
    # Of each text, what is behind the last whole block before its offset.
    assert sum(computed) <= 40 + 10 * SIZES["block_size"]


def test_an_offset_behind_the_prompt_is_refused(engine):
    with pytest.raises(UsageError, match="prompt_logprobs_from is 3"):
        engine.add(Request("1", [1, 2, 3], SamplingParams(prompt_logprobs=0, prompt_logprobs_from=3)))
    assert not engine.busy
