"""What single decoding rules promise: momentum decoding [58] and flaming-hot first tokens [186]."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.config import build
from penstock.core.errors import ConfigError
from penstock.models.decoder import Decoder
from penstock.models.sampling import probabilities
from penstock.serve.decode.fire import Fire
from penstock.serve.decode.momentum import Momentum, depths
from penstock.serve.sampling import SamplingParams
from penstock.testing.decode_rule import decode, tiny_engine
from penstock.testing.reference import distribution, next_logits
from penstock.testing.serve_model import SHAPE

#: A bigram model, probabilities of the token (column) after the token (row): greedily, 0 1 2 0 1 2 for ever.
CYCLE = torch.tensor(
    [
        [0.02, 0.60, 0.03, 0.25, 0.05, 0.05],
        [0.02, 0.03, 0.60, 0.05, 0.25, 0.05],
        [0.60, 0.02, 0.03, 0.05, 0.05, 0.25],
        [0.30, 0.02, 0.03, 0.05, 0.35, 0.25],
        [0.30, 0.02, 0.03, 0.25, 0.05, 0.35],
        [0.30, 0.02, 0.03, 0.35, 0.25, 0.05],
    ]
)


def walk(rule: Momentum, prompt: list[int], count: int) -> list[int]:
    """The tokens of momentum decoding on the bigram model."""
    tokens = list(prompt)
    for _ in range(count):
        scores = CYCLE[tokens[-1]].log()
        tokens.append(int(rule.rescore(scores, tokens).argmax()))
    return tokens[len(prompt) :]


def depth_by_search(tokens: list[int], candidate: int, most: int) -> int:
    """The longest end of the text with ``candidate`` behind it that is somewhere in the text."""
    for length in range(most, 0, -1):
        piece = [*tokens[len(tokens) - length + 1 :], candidate]
        if length <= len(tokens) + 1 and any(tokens[i : i + length] == piece for i in range(len(tokens) - length + 1)):
            return length
    return 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6))
def test_depth_is_the_length_of_the_path_that_a_token_retraces(tokens, most):
    known, depth = depths(tokens, most)
    assert known.tolist() == sorted(set(tokens))
    assert depth.tolist() == [depth_by_search(tokens, token, most) for token in known.tolist()]


def test_greedy_circles_for_ever_and_momentum_leaves():
    assert walk(Momentum(alpha=0.0), [0], 300) == [1, 2, 0] * 100
    # A token in the circle costs 0.2 for each token of the path that it retraces: 0.6 - 0.2 depth against 0.25.
    assert walk(Momentum(), [0], 4)[:3] == [1, 2, 0]
    for start in range(3):
        assert set(walk(Momentum(), [start], 3 + 2)) & {3, 4, 5}


def test_momentum_equals_its_definition_in_plain_python():
    model, rule, prompt = Decoder(SHAPE).initialize(3).eval(), Momentum(alpha=0.02, candidates=4), [7, 3, 7]
    tokens = list(prompt)
    for _ in range(40):
        chances = next_logits(model, tokens).softmax(-1).tolist()
        candidates = sorted(range(len(chances)), key=lambda token: -chances[token])[:4]
        cost = {token: rule.alpha * rule.resistance[depth_by_search(tokens, token, 5)] for token in candidates}
        tokens.append(max(candidates, key=lambda token: chances[token] - cost[token]))
    sampling = SamplingParams(temperature=0, max_tokens=40, rule=rule)
    assert decode(tiny_engine(model), [prompt], [sampling]) == [tokens[3:]]
    plain = decode(tiny_engine(model), [prompt], [SamplingParams(temperature=0, max_tokens=40)])
    assert plain != [tokens[3:]], "the case is too easy: greedy decoding does the same"


def test_momentum_takes_no_forbidden_token():
    scores = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    rule = Momentum(alpha=10.0, candidates=4)
    assert int(rule.rescore(scores, [1, 1, 1, 1, 1]).argmax()) == 1


def test_a_resistance_that_falls_is_refused():
    with pytest.raises(ConfigError, match="must not fall"):
        build(Momentum, {"resistance": (0, 2, 1)})


def test_fire_heats_the_first_token_only():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -4.0], dtype=torch.float64)
    sampling = SamplingParams(temperature=0.5, top_p=0.7, rule=Fire(temperature=8.0, top_k=3))
    hot = probabilities(logits, sampling.rule.options(sampling, 0))
    weights = [math.exp(score / 8) for score in (3, 2, 1)]
    assert hot.tolist() == pytest.approx([weight / sum(weights) for weight in weights] + [0, 0])
    for count in (1, 2, 100):
        regular = probabilities(logits, sampling.rule.options(sampling, count))
        assert regular.tolist() == pytest.approx(distribution(logits, sampling))


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_fire_raises_pass_at_n_where_the_likely_start_fails(samples):
    """A tree of two levels: after the first token 0 all fails, after any other token half of the leaves are right."""
    first = torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=torch.float64)

    def passes(sampling: SamplingParams) -> float:
        options = sampling.rule.options(sampling, 0) if sampling.rule else sampling
        right = 0.5 * float(probabilities(first, options)[1:].sum())
        return 1 - (1 - right) ** samples

    plain, fire = passes(SamplingParams()), passes(SamplingParams(rule=Fire(temperature=8.0, top_k=4)))
    hot = math.exp(-4 / 8)
    assert plain == pytest.approx(1 - (1 - 0.5 * 3 / (3 + math.e**4)) ** samples)
    assert fire == pytest.approx(1 - (1 - 0.5 * 3 * hot / (1 + 3 * hot)) ** samples)
    assert fire > 3 * plain or fire > 0.99 > plain
