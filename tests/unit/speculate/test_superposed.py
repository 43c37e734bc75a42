"""Several texts that a model drafts in one row: what it is given, and what becomes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.run import superposed
from penstock.speculate.drafters.superposed import Superposed
from penstock.speculate.tree import path
from penstock.testing.drafting_engines import engine_with
from penstock.testing.engine.pairs import END, PAIRS, grammars, may_follow
from penstock.testing.reference import greedy, next_logits
from penstock.testing.serve_model import draft_of, small_model

PROMPT = [3, 1, 4, 1, 5]


def watched(engine: Engine, count: int = 20) -> list[tuple[list[int], tuple[int, ...]]]:
    """Behind which texts ``engine`` drafts, and what, for a greedy request of ``count`` tokens."""
    speculation, seen = engine.steps.speculation, []
    draft = speculation.draft

    def watching(batch: Batch) -> None:
        draft(batch)
        seen.extend((list(entry.sequence.tokens), entry.window) for entry in batch.entries if entry.window)

    speculation.draft = watching
    engine.add(Request("0", PROMPT, SamplingParams(temperature=0, max_tokens=count)))
    while engine.busy:
        engine.step()
    return seen


def test_one_draft_without_ngrams_is_greedy_decoding():
    model = draft_of(small_model(), 0.3)
    seen = watched(engine_with(Superposed(source="a model", drafts=1, say=0), draft=model))
    assert len(seen) > 5
    for text, window in seen:
        assert list(window) == greedy(model, text, len(window))


@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_a_draft_takes_as_many_passes_whatever_there_are(drafts, monkeypatch):
    engine = engine_with(Superposed(source="a model", drafts=drafts, tokens=4))
    runner, passes = engine.steps.speculation.model.runner, []
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda step: passes.append(step.parts[0].inputs.shape[1]) or execute(step))
    engine.add(Request("0", PROMPT, SamplingParams(temperature=0, max_tokens=20)))
    engine.step()  # the prompt
    del passes[:]
    while not passes:
        engine.step()
    assert passes[1:4] == [1, 1, 1] and len(passes) == 4


def linear_model() -> Decoder:
    """One whose scores are a linear function of what it is given last, in double precision."""
    model = copy.deepcopy(small_model()).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.zero_()
    model.norm = nn.Identity()
    return model


def test_to_a_linear_model_superposed_scores_are_the_weighted_mean_of_the_drafts_own(monkeypatch):
    model, given, scores = linear_model(), [], []
    options = {"attention": "reference", "cache_tokens": 400, "controller": "fixed"}
    config = EngineConfig(draft=Superposed(source="a model", drafts=4), **options)
    engine = build_engine(copy.deepcopy(small_model()).double(), config, draft=model)
    make, sampler = superposed.superposed, engine.steps.speculation.model.sampler
    sample = sampler.sample

    def noting(embedded, tokens, weights):
        given.append((tokens[0].tolist(), weights[0]))
        return make(embedded, tokens, weights)

    def recording(logits, asked, *others):
        # Of a pass that comes before any was superposed, nothing was given.
        scores.append((given.pop() if given else None, logits.clone()))
        return sample(logits, asked, *others)

    monkeypatch.setattr(superposed, "superposed", noting)
    monkeypatch.setattr(sampler, "sample", recording)
    watched(engine)
    several = 0
    for known, logits in scores:
        if known is not None:
            tokens, weights = known
            several += len(tokens) > 1
            own = torch.stack([next_logits(model, [token]) for token in tokens])
            assert weights.sum().item() == pytest.approx(1, abs=1e-15)
            torch.testing.assert_close(logits[0], (weights.unsqueeze(-1) * own).sum(0), rtol=0, atol=1e-12)
    assert several > 5


def test_every_draft_keeps_to_the_grammar():
    options = {"attention": "reference", "cache_tokens": 400, "controller": "fixed"}
    config = EngineConfig(draft=Superposed(source="a model", drafts=4), **options)
    engine = build_engine(small_model(), config, frozenset({END}), grammars=grammars(), draft=draft_of(small_model()))
    speculation, drafted = engine.steps.speculation, 0
    draft = speculation.draft

    def watching(batch: Batch) -> None:
        nonlocal drafted
        draft(batch)
        for entry in batch.entries:
            for node, token in enumerate(entry.window):
                way = [entry.window[each] for each in path(entry.tree.parents, node)]
                assert may_follow([*entry.sequence.tokens[len(PROMPT) :], *way[:-1]], token)
                drafted += 1

    speculation.draft = watching
    for seed in range(6):
        sampling = SamplingParams(temperature=seed % 2, seed=seed, max_tokens=20, grammar=PAIRS)
        engine.add(Request(str(seed), PROMPT, sampling))
    while engine.busy:
        engine.step()
    assert drafted > 50


def test_ngrams_behind_a_draft_have_their_say():
    drafter = Superposed(source="a model", run=2, say=0.4)
    draft = drafter.start([1, 2, 3, 1, 2, 4, 1, 2, 3, 9, 1])
    # Behind 1, 2 came 3 twice and 4 once.
    found = draft.chances([2], [3, 4, 5], [0.5, 0.25, 0.25])
    assert found == pytest.approx([0.3 + 0.4 * 2 / 3, 0.15 + 0.4 / 3, 0.15])
    assert draft.chances([7, 2], [3, 4], [0.5, 0.25]) == [0.5, 0.25]  # which never came
    draft.extend([2, 5])
    assert draft.chances([1, 2], [5], [0.25]) == pytest.approx([0.15 + 0.4 / 4])


def test_texts_of_other_requests_have_it_too_unless_each_is_for_itself():
    for kept, wanted in ((1000, [0.65, 0.35]), (0, [0.5, 0.5])):
        start = Superposed(source="a model", kept=kept).opened()
        start([6, 7, 8])
        assert start([1, 6]).chances([7], [8, 9], [0.5, 0.5]) == pytest.approx(wanted)
