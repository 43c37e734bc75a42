"""Several tokens a step: results with drafted tokens are those without."""

from __future__ import annotations

import pytest

from penstock import LLM, SamplingParams
from penstock.core.progress import silent

PROMPTS = ["x = [1, 2, 3, 1, 2, 3, 1,", "import os\nimport sys\nimport", "def add(a, b):\n"]
OPTIONS = {"device": "cpu", "sequences": 4, "tokens": 64, "cache_tokens": 1024, "check": True}


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("python-1m", **OPTIONS)


@pytest.fixture(scope="module")
def drafting() -> LLM:
    return LLM("python-1m", draft="ngram", controller="fixed", **OPTIONS)


def told(llm: LLM, sampling: SamplingParams) -> tuple[list[tuple], list[float]]:
    """What is said of each continuation, and the log-probabilities of all their tokens."""
    results = llm.generate(PROMPTS, sampling, progress=silent)
    assert not llm.engine.busy
    outputs = [output for result in results for output in result.outputs]
    scores = [
        told[t].logprob for o in outputs for t, told in zip(o.token_ids, o.logprobs or [], strict=bool(o.logprobs))
    ]
    return [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in outputs], scores


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_tokens_and_log_probabilities_are_the_same(plain, drafting, temperature):
    sampling = SamplingParams(temperature=temperature, max_tokens=48, n=2, seed=3, logprobs=0, ignore_eos=True)
    before = drafting.engine.snapshot().accepted_tokens
    (ours, scores), (expected, wanted) = told(drafting, sampling), told(plain, sampling)
    assert ours == expected
    assert scores == pytest.approx(wanted, abs=1e-4)
    assert drafting.engine.snapshot().accepted_tokens > before


def test_a_stop_string_in_the_midst_of_a_step_s_tokens(plain, drafting):
    (whole, *_) = plain.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48), progress=silent)
    text = whole.outputs[0].text
    for start in range(4, len(text) - 3, 17):
        sampling = SamplingParams(temperature=0, max_tokens=48, stop=text[start : start + 3], logprobs=0)
        (ours, scores), (expected, wanted) = told(drafting, sampling), told(plain, sampling)
        assert ours == expected
        assert scores == pytest.approx(wanted, abs=1e-4)
        assert ours[0][2:4] == ("stop", text[start : start + 3])


def test_what_is_counted_as_accepted_is_in_the_text(plain, drafting):
    """Those that were accepted behind the end of a text are not: neither behind a token that ends it, of which the
    engine knows, nor behind a string, of which it does not."""
    prompt = "x = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,"
    (whole,) = plain.generate([prompt], SamplingParams(temperature=0, max_tokens=24), progress=silent)
    text, tokens = whole.outputs[0].text, whole.outputs[0].token_ids
    cut = 0
    for ends in (*({"stop_tokens": [each]} for each in tokens[3:12]), {"stop": text[3:5]}, {"stop": text[9:12]}):
        before = drafting.engine.snapshot()
        sampling = SamplingParams(temperature=0, max_tokens=24, **ends)
        (result,) = drafting.generate([prompt], sampling, progress=silent)
        now, made = drafting.engine.snapshot(), len(result.outputs[0].token_ids)
        assert result.num_accepted_tokens <= min(made, result.num_drafted_tokens)
        if "stop_tokens" in ends:
            # Each step brings a token beside those that were accepted, but the last where one of these ended the text.
            steps = now.sequence_steps - before.sequence_steps
            assert made - result.num_accepted_tokens in (steps - 1, steps)
            cut += made - result.num_accepted_tokens == steps - 1
            assert now.accepted_tokens - before.accepted_tokens == result.num_accepted_tokens
            assert now.drafted_tokens - before.drafted_tokens == result.num_drafted_tokens
    assert cut
    (result,) = drafting.generate([prompt], SamplingParams(temperature=0, max_tokens=24), progress=silent)
    assert 0 < result.num_accepted_tokens < len(tokens)


def test_a_request_can_do_without(drafting):
    before = drafting.engine.snapshot().drafted_tokens
    drafting.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, drafts=False), progress=silent)
    assert drafting.engine.snapshot().drafted_tokens == before


@pytest.mark.parametrize(
    ("draft", "verifier", "tree"),
    [
        ("python-1m", "exact_match", ""),
        ("python-1m", "accept_residual", ""),
        ("python-1m", "exact_match", "3,2"),
        pytest.param("python-1m", "recursive_distinct", "3,2", marks=pytest.mark.slow),
        ({"name": "ngram", "shortest": 1}, "exact_match", "3,2"),
    ],
)
def test_a_drafted_end_of_text_ends_a_grammar(plain, draft, verifier, tree):
    """The model drafts for itself, so that ends are drafted and accepted; nothing can follow them in a grammar."""
    drafting = LLM("python-1m", draft=draft, draft_tree=tree, controller="fixed", verifier=verifier, **OPTIONS)
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(
            temperature=temperature, max_tokens=60, n=4, grammar={"regex": "[a-z]{3,9}(, [a-z]{3,9}){2}"}
        )
        (ours, _), (expected, _) = told(drafting, sampling), told(plain, sampling)
        assert all(reason == "stop" for _, _, reason, _ in ours)
        assert ours == expected or (verifier != "exact_match" and temperature)
    assert drafting.engine.snapshot().accepted_tokens > 20
