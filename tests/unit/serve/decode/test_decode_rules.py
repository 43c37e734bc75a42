"""What single decoding rules promise: momentum decoding [58], flaming-hot first tokens [186] and contrast [174]."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.models.decoder import Decoder
from penstock.models.sampling import probabilities
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.decode.fire import Fire
from penstock.serve.decode.momentum import Momentum, depths
from penstock.serve.decode.uscd import UncertaintyAwareContrast
from penstock.serve.messages import Request
from penstock.testing.decode_rule import decode, tiny_engine
from penstock.testing.reference import contrasted, distribution, next_logits, sample
from penstock.testing.serve_model import SHAPE, small_model

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
        tokens.append(int(rescored(rule, scores, tokens).argmax()))
    return tokens[len(prompt) :]


def rescored(rule: Momentum, scores: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The scores [vocabulary] after ``tokens`` under the rule."""
    known = {name: torch.from_numpy(values) for name, values in rule.read([tokens]).items()}
    return rule.rescore(scores.unsqueeze(0), **known)[0]


def combined(rule: UncertaintyAwareContrast, *scores: torch.Tensor) -> torch.Tensor:
    """The scores [vocabulary] of one group."""
    return rule.combine(torch.stack(scores).unsqueeze(0))[0]


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
    assert int(rescored(rule, scores, [1, 1, 1, 1, 1]).argmax()) == 1


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


def contrast_by_hand(p: list[float], other: list[float], rule: UncertaintyAwareContrast) -> list[float]:
    """The distribution of the next token, number by number."""
    mean = 1 / len(p)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in p) / (len(p) - 1))
    if deviation >= rule.threshold / math.sqrt(len(p)):
        return p
    left = [x - rule.weight * y if x >= rule.floor * mean else 0.0 for x, y in zip(p, other, strict=True)]
    left = [max(x, 0.0) for x in left]
    return [x / math.fsum(left) for x in left] if any(left) else p


@given(
    st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.3, 0.7, 5.0]),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_contrast_is_the_papers_difference_where_the_model_is_unsure(scores, weight, threshold, floor):
    rule = UncertaintyAwareContrast(prompt=(0,), weight=weight, threshold=threshold, floor=floor)
    own, other = torch.tensor(scores, dtype=torch.float64).unbind(-1)
    found = combined(rule, own, other).softmax(-1)
    wanted = contrast_by_hand(own.softmax(-1).tolist(), other.softmax(-1).tolist(), rule)
    # What is exactly at the floor, or at the threshold, may fall to either side.
    if not any(math.isclose(x * len(scores), floor, rel_tol=1e-9) for x in own.softmax(-1).tolist()):
        assert found.tolist() == pytest.approx(wanted, abs=1e-9)


def test_the_gate_opens_on_exactly_the_unsure_rows():
    """Fixed tables: a peaked one, an even one, and between them two that the threshold tells apart."""
    tables = torch.tensor(
        [[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1]]
    )
    poorer = torch.tensor([0.1, 0.1, 0.1, 0.7])
    deviation = tables.std(-1) * 2
    rule = UncertaintyAwareContrast(prompt=(0,), threshold=float(deviation[2:].mean()), weight=0.5, floor=0)
    changed = [not torch.equal(combined(rule, row.log(), poorer.log()), row.log()) for row in tables]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_a_companion_goes_on_with_the_same_tokens_in_any_batch(options):
    """Requests with and without the rule; a companion's prompt is also the beginning of another prompt."""
    model = small_model()
    rule = UncertaintyAwareContrast(prompt=(5, 6, 7, 8, 9), threshold=1, weight=0.9)
    prompts = [[1, 2, 3], [4] * 9, [5, 6, 7, 8, 9, 10], [1, 2, 3]]
    samplings = [
        SamplingParams(max_tokens=12, seed=place, rule=rule if place != 1 else None, **options) for place in range(4)
    ]
    found = decode(tiny_engine(model), prompts, samplings)
    for prompt, sampling, tokens in zip(prompts, samplings, found, strict=True):
        expected = contrasted(model, prompt, sampling, rule) if sampling.rule else sample(model, prompt, sampling)
        assert tokens == expected
    assert found[0] != sample(model, prompts[0], samplings[0]), "the rule changes nothing here"


def test_a_contrast_that_cannot_be_had_is_refused():
    for rule, reason in (
        (UncertaintyAwareContrast(prompt=(SHAPE.vocabulary,)), "vocabulary"),
        (UncertaintyAwareContrast(prompt=(1,) * SHAPE.context), "no room"),
        (UncertaintyAwareContrast(prompt="def add("), "text"),
    ):
        engine = tiny_engine(small_model())
        with pytest.raises(UsageError, match=reason):
            engine.add(Request("", [1], SamplingParams(max_tokens=4, rule=rule)))
        assert not engine.busy
    with pytest.raises(ConfigError, match="prompt"):
        build(SamplingParams, {"rule": "uscd"}, "the request")


def test_text_becomes_tokens_once():
    sampling = build(SamplingParams, {"rule": {"name": "uscd", "prompt": "ab"}}, "the request")
    read = sampling.tokenized(lambda text: [ord(letter) for letter in text], lambda text: [])
    assert read.companions == ((97, 98),)
    assert read.tokenized(lambda text: [], lambda text: []) == read
    assert SamplingParams().tokenized(lambda text: [], lambda text: []) == SamplingParams()
