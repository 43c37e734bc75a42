"""Sampling of mixed rows at once, beside definitions in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.randomness import derive, torch_generator, uniforms
from penstock.serve.choose.logprobs import Logprobs, TokenLogprobs
from penstock.serve.choose.penalties import Penalties
from penstock.serve.choose.sampler import Sampled
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.testing.reference import distribution, pick
from penstock.testing.serve_rows import Rows

CPU = torch.device("cpu")


def sequence(sampling: SamplingParams, tokens: list[int], prompt: int, stop: tuple[int, ...] = ()) -> Sequence:
    return Sequence(
        Request("", tokens[:prompt], sampling), 0, sampling, list(tokens), 1000, 0, prompt=prompt, stop=stop
    )


def rescored(logits: list[float], sampling: SamplingParams, tokens: list[int], prompt: int, stop=()) -> list[float]:
    """The scores after bias, penalties and bans, one token at a time."""
    scores = []
    for token, score in enumerate(logits):
        score += sampling.logit_bias.get(token, 0.0)
        if token in tokens:
            score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
        count = tokens[prompt:].count(token)
        score -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        banned = token in stop and len(tokens) - prompt < sampling.min_tokens
        scores.append(-math.inf if banned else score)
    return scores


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.8, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.4, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, 11), st.sampled_from([-100.0, -1.0, 2.0]), max_size=3),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 0, 2]),
    seed=st.integers(0, 1000),
)
TEXTS = st.lists(st.integers(0, 11), min_size=1, max_size=9)


def logprobs_of(sampled: Sampled, alternatives: list[int | None]) -> list[TokenLogprobs | None]:
    """What is told of each row, with so many ``alternatives``; None where it does not want any."""
    found = iter(range(len(alternatives)))
    return [
        None if most is None else next(iter(sampled.logprobs.rows.cut(place := next(found), place + 1, most)))
        for most in alternatives
    ]


@given(st.lists(st.tuples(PARAMS, TEXTS), min_size=1, max_size=6), st.integers(0, 2**32))
def test_each_row_gets_what_it_gets_alone_and_what_the_definitions_say(rows, seed):
    logits = torch.randn(len(rows), 12, generator=torch_generator(seed, "logits")) * 3
    sequences = [sequence(params, tokens, 1, stop=(0, 5)) for params, tokens in rows]
    counts = [len(tokens) - 1 for _, tokens in rows]
    slots = list(range(len(rows)))[::-1]
    sampler = Rows(len(rows), 12, CPU)
    for slot, each in zip(slots, sequences, strict=True):
        sampler.add(slot, each)
    sampled = sampler.sample(logits, sampler.ask(slots, counts))
    told = logprobs_of(sampled, [params.logprobs for params, _ in rows])
    for row, (params, tokens) in enumerate(rows):
        alone = Rows(1, 12, CPU)
        alone.add(0, sequences[row])
        again = alone.sample(logits[row : row + 1], alone.ask([0], [counts[row]]))
        assert int(again.tokens[0]) == int(sampled.tokens[row])
        assert logprobs_of(again, [params.logprobs]) == [told[row]]
        scores = rescored(logits[row].tolist(), params, tokens, 1, (0, 5))
        chances = distribution(torch.tensor(scores, dtype=torch.float64), params)
        uniform = float(uniforms(derive(params.seed, "sample"), np.array([counts[row]]))[0])
        assert int(sampled.tokens[row]) == pick(chances, uniform)


MIXED = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.9, presence_penalty=0.8, frequency_penalty=0.5, repetition_penalty=1.3),
    SamplingParams(temperature=0.9, logit_bias={2: 1.5, 7: -2.0}, top_p=0.95),
    SamplingParams(temperature=0.0),
]


def test_the_empirical_law_is_the_distribution_asked_for():
    """Chi-square, 2,000 seeds of each of eight kinds of request, all in one batch."""
    draws, text = 2000, [3, 3, 1, 4, 4, 4]
    logits = torch.randn(10, generator=torch_generator(0, "logits")) * 1.5
    total = draws * len(MIXED)
    sampler = Rows(total, 10, CPU)
    for slot in range(total):
        params = MIXED[slot % len(MIXED)].model_copy(update={"seed": slot})
        sampler.add(slot, sequence(params, text, 2))
    tokens = sampler.sample(logits.expand(total, -1), sampler.ask(list(range(total)), [4] * total)).tokens.view(
        draws, -1
    )
    for kind, params in enumerate(MIXED):
        scores = rescored(logits.tolist(), params, text, 2)
        chances = np.array(distribution(torch.tensor(scores, dtype=torch.float64), params))
        found = np.bincount(tokens[:, kind].numpy(), minlength=10)
        assert not found[chances == 0].any()
        possible = chances > 0
        expected = draws * chances[possible]
        statistic = float(((found[possible] - expected) ** 2 / expected).sum())
        freedom = int(possible.sum()) - 1
        # Five standard deviations of the statistic.
        assert statistic <= freedom + 5 * math.sqrt(2 * freedom), (kind, found, expected)


def test_penalties_follow_the_tokens_that_were_drawn():
    """The host never tells the sampler which tokens came: slots change hands, rows grow, the oracle recounts."""
    sampler, draw = Rows(40, 12, CPU), torch_generator(1, "logits")
    texts: dict[int, tuple[Sequence, list[int]]] = {}
    for step in range(60):
        for slot in range(step % 3, min(40, 3 + step), 1 + step % 4):
            if slot not in texts or len(texts[slot][1]) > 25:
                penalty = 0.9 * (slot % 3 > 0)
                params = SamplingParams(temperature=0.8, presence_penalty=penalty, frequency_penalty=penalty, seed=step)
                each = sequence(params, [slot % 12, 5, 5], 2)
                sampler.add(slot, each)
                texts[slot] = each, list(each.tokens)
        slots = sorted(texts)
        logits = torch.randn(len(slots), 12, generator=draw)
        counts = [len(texts[slot][1]) - 2 for slot in slots]
        tokens = sampler.sample(logits, sampler.ask(slots, counts)).tokens.tolist()
        for row, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            params, text = texts[slot][0].sampling, texts[slot][1]
            scores = torch.tensor(rescored(logits[row].tolist(), params, text, 2), dtype=torch.float64)
            uniform = float(uniforms(derive(params.seed, "sample"), np.array([counts[row]]))[0])
            assert token == pick(distribution(scores, params), uniform)
            text.append(token)


def test_rows_of_penalties_are_used_again():
    penalties = Penalties(slots=20, vocabulary=12, device=CPU)
    for turn in range(100):
        penalties.drop(turn % 20)
        if turn % 2:
            penalties.add(turn % 20, np.array([1, 2, 3]), 1)
    assert 10 <= len(penalties) < 20


def test_logprobs_are_the_models_own_whatever_the_sampling():
    logits = torch.randn(3, 30, generator=torch_generator(2, "logits"))
    sampler = Rows(3, 30, CPU)
    sampler.add(0, sequence(SamplingParams(temperature=0.1, top_k=2, logit_bias={4: 100.0}, logprobs=5), [1], 1))
    sampler.add(1, sequence(SamplingParams(), [1], 1))
    sampler.add(2, sequence(SamplingParams(n=1, best_of=2), [1], 1))
    sampled = sampler.sample(logits, sampler.ask([0, 1, 2], [0, 0, 0]))
    first, none, bare = logprobs_of(sampled, [5, None, 0])
    wanted = logits.double().log_softmax(-1)[0].tolist()
    ranked = sorted(range(30), key=lambda token: -wanted[token])
    assert none is None and bare.top == []
    assert first.token == 4 and first.logprob == pytest.approx(wanted[4], abs=1e-6)
    assert first.rank == ranked.index(4) + 1
    assert [token for token, _ in first.top] == ranked[:5]
    assert [value for _, value in first.top] == pytest.approx([wanted[token] for token in ranked[:5]], abs=1e-6)


def test_more_alternatives_than_tokens():
    logits = torch.randn(2, 3, generator=torch_generator(3, "logits"))
    rows = Logprobs.of(logits, torch.tensor([0, 2]), 20).rows
    (one,), (two,) = rows.cut(0, 1, 20), rows.cut(1, 2, 1)
    assert len(one.top) == 3 and len(two.top) == 1


def test_logits_stay_as_they_are():
    logits = torch.randn(1, 12, generator=torch_generator(4, "logits"))
    before, sampler = logits.clone(), Rows(1, 12, CPU)
    sampler.add(0, sequence(SamplingParams(presence_penalty=2, logit_bias={1: 3}, min_tokens=2), [1, 2], 1, (4,)))
    sampler.sample(logits, sampler.ask([0], [1]))
    assert torch.equal(logits, before)
