"""Verifiers at work in an engine: the distribution of what comes out, beside the model's own."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import numpy as np
import pytest
import torch

from penstock.core.config import build
from penstock.core.errors import ConfigError
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import HeadModule
from penstock.models.heads.early_exit import EarlyExit
from penstock.models.heads.headed import Headed
from penstock.models.heads.ppd import ParallelPrompts
from penstock.models.sampling import Sampling, probabilities
from penstock.policy import create, index
from penstock.serve.build import build_engine
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.speculate.controllers.specdec_pp import SpecDecPlusPlus
from penstock.speculate.drafters.cascade import Cascade
from penstock.speculate.drafters.head import Head
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.speculate.drafters.ppd import ParallelPromptDecoding
from penstock.speculate.verifiers.accept_residual import AcceptResidual
from penstock.testing.drafting_engines import KINDS, engine_with, outcomes
from penstock.testing.model_head import learnt
from penstock.testing.reference import next_logits
from penstock.testing.serve_model import draft_of, predictor_of, small_model
from penstock.testing.serve_rows import Rows
from penstock.train.objectives.self_distillation import SelfDistillation

PROMPT = [3, 1, 4, 1, 5]
#: The model goes on with what is in it, in one of six texts.
REPEATING = [16, 7, 38, 16, 7, 38, 16, 7, 38]
MODEL = Model(source="a model", tokens=3)
PROBING = {"name": "ppd", "source": "a head"}
SUPERPOSING = {"name": "superposed", "source": "a model"}


def sequence(sampling: SamplingParams) -> Sequence:
    return Sequence(Request("0", [0], sampling), 0, sampling, [0, 0], 9, 0, prompt=1)


def law(sampling: Sampling, length: int, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The chances of all texts of ``length`` tokens after the ``prompt``, of more than none."""
    found = {(): 1.0}
    for _ in range(length):
        ahead = {}
        for text, chance in found.items():
            chances = probabilities(next_logits(small_model(), [*prompt, *text]).double(), sampling)
            ahead |= {(*text, token): chance * float(chances[token]) for token in chances.nonzero().flatten().tolist()}
        found = ahead
    return found


DRAFTS = {
    "a model": (MODEL, lambda: draft_of(small_model(), 0.3)),
    "a model meanwhile": (Cascade(source="a model", tokens=3), lambda: draft_of(small_model(), 0.1)),
    "the text": (Ngram(tokens=3, shortest=1), lambda: None),
    "a head": (Head(source="a head", tokens=3), lambda: learnt(small_model(), EarlyExit(layers=2)).head.eval()),
    "probes": (ParallelPromptDecoding(source="a head"), lambda: guessing(small_model())),
    "probes in a row": (ParallelPromptDecoding(source="a head", drafts=1), lambda: guessing(small_model())),
}


@functools.cache
def guessing(target: Decoder) -> HeadModule:
    """Prompt tokens that have learnt what the ``target`` says behind the :data:`PROMPT`."""
    model = Headed.new(target, ParallelPrompts(tokens=3), seed=0)
    texts = torch.tensor([[*PROMPT, *text] for text in law(Sampling(temperature=1.5, top_k=3), 3, PROMPT)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(20):
        batch = Batch(texts[:, :-1], texts[:, 1:], torch.zeros_like(texts[:, 1:]))
        optimizer.zero_grad()
        SelfDistillation().loss(model, batch, CausalRows.of(texts.shape[1] - 1)).backward()
        optimizer.step()
    return model.head.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("verifier", "drafts", "tree"),
    [
        ("accept_residual", "a model", ""),
        ("exact_match", "a model", ""),
        ("accept_residual", "a head", ""),
        ("recursive_distinct", "a model", "2,2"),
        ("accept_residual", "a model meanwhile", ""),
        pytest.param("recursive_distinct", "a model meanwhile", "2,2", marks=pytest.mark.slow),
        ("recursive_distinct", "probes", ""),
        *(
            pytest.param(verifier, probes, "", marks=pytest.mark.slow)
            for verifier, probes in (
                ("exact_match", "probes"),
                ("k_seq", "probes"),
                ("importance", "probes"),
                ("recursive", "probes"),
                ("accept_residual", "probes in a row"),
                ("greedy_drafts", "probes in a row"),
            )
        ),
        *(
            pytest.param(verifier, "a model", "3,2", marks=pytest.mark.slow)
            for verifier in index().names("speculate.verifier")
            if verifier not in ("accept_residual", "recursive_distinct")
        ),
        pytest.param("recursive_distinct", "a head", "1,3", marks=pytest.mark.slow),
        pytest.param("exact_match", "the text", "3,2", marks=pytest.mark.slow),
        pytest.param("accept_residual", "a model that stops", "", marks=pytest.mark.slow),
    ],
)
def test_sampled_texts_have_the_models_distribution(verifier, drafts, tree):
    """A chi-square over the real engine, which drafts, accepts and draws from residuals as it serves."""
    sampling = Sampling(temperature=1.5, top_k=3)
    drafter, make = DRAFTS[drafts.removesuffix(" that stops")]
    sizes, stops, draft = {"sequences": 64, "cache_tokens": 4096}, drafts.endswith(" that stops"), make()
    controller = SpecDecPlusPlus(threshold=0.4) if stops else "fixed"
    options = {"draft": drafter, "draft_tree": tree, "controller": controller, "verifier": verifier}
    config, predictor = EngineConfig(attention="reference", **sizes, **options), predictor_of(draft) if stops else None
    engine = build_engine(small_model(), config, draft=draft, predictor=predictor)
    texts: dict[str, list[int]] = {}
    prompt = REPEATING if drafts == "the text" else PROMPT
    length = 4 if drafts.startswith("probes") else 3  # there are none before the first token
    for seed in range(500):
        params = SamplingParams(temperature=1.5, top_k=3, seed=seed, max_tokens=length)
        engine.add(Request(str(seed), prompt, params))
    while engine.busy:
        for delta in engine.step():
            texts.setdefault(delta.id, []).extend(delta.tokens)
    found, wanted = Counter(tuple(text) for text in texts.values()), law(sampling, length, prompt)
    assert set(found) <= set(wanted)
    # Those that are expected less than 5 times are counted together.
    often = [text for text, chance in wanted.items() if chance * len(texts) >= 5]
    counts = [found[text] for text in often] + [len(texts) - sum(found[text] for text in often)]
    expected = [wanted[text] * len(texts) for text in often]
    expected.append(len(texts) - sum(expected))
    pairs = [pair for pair in zip(counts, expected, strict=True) if pair[1] >= 1]
    distance = sum((count - mean) ** 2 / mean for count, mean in pairs)
    chance = torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2).double(), torch.tensor(distance / 2).double())
    assert chance > 1e-3
    now = engine.snapshot()
    assert 0 < now.accepted_tokens < now.drafted_tokens


def test_a_residual_is_drawn_from_where_a_draft_is_rejected():
    """All drafts and draws of one place, on a grid that hits every chance exactly."""
    target, proposal, size = (0.25, 0.75, 0.0), (0.5, 0.25, 0.25), 16
    found = Counter()
    for draft, share in enumerate(proposal):
        rows = Rows(1, 3, torch.device("cpu"))
        rows.add(0, sequence(SamplingParams(temperature=1)))
        for place in range(size):
            asked = rows.ask([0], [1], [(draft,)])
            asked = dataclasses.replace(asked, uniform=np.full(2, (place + 0.5) / size))
            proposals = Proposals(AcceptResidual(), torch.tensor([proposal]), np.array([[draft]]), np.array([[0]]))
            logits = torch.tensor([target, target]).log()
            sampled, _ = rows.sampler.sample(logits, asked, None, proposals)
            token = int(sampled.tokens[0])
            assert sampled.settled(1) == [1 + (token == draft)]
            found[token] += share / size
    assert found == {0: 0.25, 1: 0.75}


def test_greedy_texts_are_the_same_under_every_verifier():
    plain = outcomes(engine_with(None))
    greedy = [str(number) for number, kind in enumerate(KINDS) if kind["temperature"] == 0]
    drafted = outcomes(engine_with(MODEL, verifier=AcceptResidual()))
    assert {name: drafted[name] for name in drafted if name[0] in greedy} == {
        name: plain[name] for name in plain if name[0] in greedy
    }


def test_more_is_accepted_than_by_matching_where_texts_are_sampled():
    shares = []
    for verifier in ("exact_match", "accept_residual"):
        engine = engine_with(MODEL, verifier=create("speculate.verifier", verifier))
        for seed in range(16):
            params = SamplingParams(temperature=1, seed=seed, max_tokens=20, top_k=20)
            engine.add(Request(str(seed), PROMPT, params))
        while engine.busy:
            engine.step()
        now = engine.snapshot()
        shares.append(now.accepted_tokens / now.drafted_tokens)
    assert shares[1] > shares[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verifier": "recursive"}, "one token is drafted for a place"),
        ({"verifier": "accept_residual", "draft_tree": "3,2"}, "drafts 3 tokens for a place"),
        ({"draft": None, "draft_tree": "3,2"}, "there is none"),
        ({"draft_tree": "4,4,4,4"}, "more than the 256 tokens"),
        ({"draft_tree": "0"}, "greater than or equal to 1"),
        ({"draft_tree": "wide"}, "valid integer"),
        ({"draft_tree": "2", "controller": "tetris"}, "weighs chains"),
        ({"draft_tree": "2", "deterministic": True}, "tokens in a row"),
        ({"draft_tree": "2", "codec": "int8"}, "codec 'plain'"),
        ({"draft": "ngram", "draft_tree": "2", "kv": "sink_window"}, "compresses the cache"),
        ({"draft": "ngram", "draft_tree": "2", "kv": "shadow"}, "compresses the cache"),
        ({"draft": "ngram", "draft_tree": "2", "kv": "minicache"}, "compresses the cache"),
        ({"draft": "cascade"}, "'cascade' drafts with a model or a head, and none is named"),
        ({"draft": PROBING, "draft_tree": "2"}, "shapes its trees itself"),
        ({"draft": PROBING, "controller": "tetris"}, "weighs chains"),
        ({"draft": PROBING, "deterministic": True}, "tokens in a row: draft with another drafter"),
        ({"draft": PROBING, "record": "steps"}, "a recording has no probes"),
        ({"draft": PROBING, "verifier": "accept_residual"}, "set draft.drafts=1"),
        ({"draft": PROBING, "verifier": "greedy_drafts"}, "take another verifier"),
        ({"draft": "ppd"}, "'ppd' drafts with a model or a head, and none is named"),
        ({"draft": SUPERPOSING, "draft_tree": "2"}, "shapes its trees itself"),
        ({"draft": SUPERPOSING, "controller": "fallback"}, "drafts several at once"),
        ({"draft": SUPERPOSING, "verifier": "recursive"}, "for drafts that are drawn"),
        ({"draft": SUPERPOSING, "codec": "int8"}, "set draft.drafts=1"),
        ({"verifier": "accept_residual", "deterministic": True}, "deterministic needs the verifier 'exact_match'"),
        ({"verifier": "accept_residual", "record": "steps"}, "record needs the verifier 'exact_match'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        build(EngineConfig, {"draft": "python-1m", **options}, "the engine's options")
