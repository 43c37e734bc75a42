"""Continuations that are computed in one row [399]: what becomes of them beside others, and what is told of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from in_process import asked
from penstock import LLM
from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.core.progress import silent
from penstock.models.superposed import SuperposedRows, superposed
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.choose.superposed import SuperposedTexts
from penstock.serve.config import EngineConfig
from penstock.serve.decode.superposed import Superposed
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.run.record import read_header
from penstock.serve.run.replay import replay
from penstock.testing.decode_rule import superposed_texts, tiny_engine
from penstock.testing.reference import greedy, prompt_logprobs
from penstock.testing.serve_model import small_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]
SIZES = {"attention": "reference", "tokens": 40, "sequences": 8, "block_size": 4, "cache_tokens": 400}


def asking(n: int = 3, count: int = 12, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, n=n, rule=Superposed(), **more)


def told(engine: Engine) -> dict[tuple[str, int], list[Delta]]:
    """The news of each continuation."""
    found: dict[tuple[str, int], list[Delta]] = {}
    while engine.busy:
        for delta in engine.step():
            found.setdefault((delta.id, delta.index), []).append(delta)
    return found


@pytest.mark.parametrize("say", [0.0, 0.7])
def test_one_text_is_what_the_model_says_greedily(say):
    engine = tiny_engine(small_model())
    engine.add(Request("a", PROMPT, SamplingParams(temperature=0, max_tokens=30, rule=Superposed(say=say))))
    ((delta,),) = told(engine).values()
    assert delta.tokens == greedy(small_model(), PROMPT, 30)


def test_a_row_is_the_sum_of_its_tokens_and_one_token_is_itself():
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    tokens, weights = torch.tensor([[2, 7, 0], [5, 0, 0]]), torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).double()
    x = SuperposedRows(torch.tensor([3, 1]), tokens, weights).put(table[[8, 0, 8, 0]], lambda each: table[each])
    wanted = 0.5 * table[2].double() + 0.25 * table[7].double() + 0.25 * table[0].double()
    assert torch.equal(x, torch.stack([table[8], table[5], table[8], wanted.bfloat16()]))
    one = superposed(lambda each: table[each], torch.tensor([[4]]), torch.ones(1, 1).double())
    assert torch.equal(one, table[[4]])


def test_ngrams_of_the_prompt_have_their_say_behind_each_text():
    judged = Superposed(run=2, say=0.4).judge([1, 2, 3, 1, 2, 4, 1, 2, 3, 9, 1])
    logprobs = [math.log(each) for each in (0.5, 0.25, 0.125)]
    # Behind 1, 2 came 3 twice and 4 once.
    found = [math.exp(each) for each in judged([2], [3, 4, 5], logprobs)]
    assert found == pytest.approx([0.3 + 0.4 * 2 / 3, 0.15 + 0.4 / 3, 0.075])
    assert judged([7, 2], [3, 4, 5], logprobs) == logprobs  # which never came
    assert Superposed(run=2, say=0).judge([1, 2, 3, 1, 2])([], [3, 4, 5], logprobs) == logprobs


def test_other_rows_have_other_numbers_and_the_same_row_has_the_same():
    def numbers(most: int, gap: float) -> list[int]:
        texts = SuperposedTexts(most, lambda ahead, tokens, logprobs: list(logprobs), frozenset())
        top = [(token, -0.1 - gap * token) for token in range(8)]
        return [texts.cross(TokenLogprobs(0, -0.1, 1, top)) for _ in range(3)]

    assert numbers(3, 0.5) == numbers(3, 0.5)
    several = [numbers(most, gap)[0] for most, gap in ((1, 0.5), (3, 0.5), (4, 0.5), (3, 0.6))]
    assert len({*several}) == len(several) and max(several) < 0, "rows that differ may be taken for each other"


def test_others_draft_beside_them_and_prompts_come_in_pieces():
    config = EngineConfig.model_validate({**SIZES, "tokens": 9, "draft": "ngram", "check": True})
    engine = build_engine(small_model(), config)
    engine.add(Request("texts", PROMPT, asking(4)))
    engine.add(Request("plain", PROMPT, SamplingParams(temperature=0, max_tokens=20)))
    found = told(engine)
    wanted = superposed_texts(small_model(), PROMPT, asking(4))
    assert [found["texts", index][0].tokens for index in range(4)] == [[*text] for text in wanted]
    assert [token for delta in found["plain", 0] for token in delta.tokens] == greedy(small_model(), PROMPT, 20)
    assert engine.snapshot().held == 0


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_what_there_is_is_told_where_a_request_is_ended(steps):
    engine = tiny_engine(small_model())
    engine.add(Request("a", PROMPT, asking(3, 40)))
    for _ in range(steps):
        assert engine.step() == []
    engine.abort("a")
    found = told(engine)
    assert sorted(found) == [("a", 0), ("a", 1), ("a", 2)]
    (count,) = {len(delta.tokens) for (delta,) in found.values()}
    assert count <= steps and (count > 0) == (steps > 1)
    assert {delta.finish for (delta,) in found.values()} == {Finish.ABORT}
    if count:
        wanted = superposed_texts(small_model(), PROMPT, asking(3, count))
        assert [found["a", index][0].tokens for index in range(3)] == [[*text] for text in wanted]
    assert engine.snapshot().held == 0 and not engine.busy


def test_the_prompt_is_shared_and_scored_once():
    engine = tiny_engine(small_model())
    engine.add(Request("a", PROMPT, asking(3, prompt_logprobs=0)))
    found = told(engine)
    assert found["a", 0][0].prompt_logprobs is not None and found["a", 1][0].prompt_logprobs is None
    scores = found["a", 0][0].prompt_logprobs.logprobs
    np.testing.assert_allclose(scores, prompt_logprobs(small_model(), PROMPT), atol=1e-4)
    engine.add(Request("b", PROMPT, asking(3)))
    again = told(engine)
    assert again["b", 0][0].cached == 8  # full blocks of the prompt
    assert [delta.tokens for (delta,) in again.values()] == [delta.tokens for (delta,) in found.values()]


def test_a_text_of_several_is_not_changed_by_itself():
    engine = tiny_engine(small_model())
    engine.add(Request("a", PROMPT, asking()))
    engine.step()
    for change in (lambda: engine.truncate("a", len(PROMPT)), lambda: engine.feed("a", [1])):
        with pytest.raises(UsageError, match="computed in one row"):
            change()


def test_recorded_texts_are_computed_again(tmp_path):
    path = tmp_path / "steps.bin"
    engine = build_engine(small_model(), EngineConfig.model_validate({**SIZES, "record": str(path)}), source="small")
    engine.add(Request("a", PROMPT, asking(3)))
    engine.add(Request("b", PROMPT[:4], asking(2, logprobs=1)))
    told(engine)
    engine.close()
    read = EngineConfig.model_validate(read_header(path)["engine"])
    found = replay(path, build_runner(small_model(), read))
    assert found.chosen == found.equal == 24


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"temperature": 0.5}, "set temperature to 0"),
        ({"n": 21}, "up to 20 continuations can be superposed"),
        ({"frequency_penalty": 1.0, "min_tokens": 2}, "leave out frequency_penalty and min_tokens"),
        ({"grammar": {"regex": "a"}}, "leave out grammar"),
        ({"n": 2, "best_of": 3}, "leave out best_of"),
        ({"rule": {"name": "superposed", "say": 1.0}}, "say"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(more, words):
    with pytest.raises(ConfigError, match=words):
        build(SamplingParams, {"temperature": 0, "rule": "superposed", **more}, "the request")


def test_a_server_says_that_there_is_nothing_to_stream():
    body = {"prompt": "x", "n": 2, "temperature": 0, "rule": "superposed", "stream": True}
    answer = asked("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("superposed texts are known at their end: nothing to stream")


def test_stop_strings_end_each_text_by_itself():
    llm = LLM("python-1m", device="cpu", sequences=2, tokens=64, cache_tokens=256)
    params = {"temperature": 0, "n": 3, "max_tokens": 12, "rule": "superposed"}
    (whole,) = llm.generate("def add(a, b):\n", SamplingParams(**params), progress=silent)
    texts = [output.text for output in whole.outputs]
    assert len({*texts}) == 3 and {output.finish_reason for output in whole.outputs} == {"length"}
    stop = texts[0].strip()[:4]
    (cut,) = llm.generate("def add(a, b):\n", SamplingParams(**params, stop=stop), progress=silent)
    assert [output.text for output in cut.outputs] == [text.split(stop)[0] for text in texts]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].stop_reason == stop
    assert not llm.engine.busy
