"""Steps in parts that a CUDA device computes at the same time: the logits of the step in one part."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.randomness import numpy_generator
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Drawn
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)
#: Of the root mean square of the logits: bf16 products of another number of rows are added up in another order.
TOLERANCE = 0.03


def engine_of(
    compile: bool, loop: str = "plain", shape: DecoderConfig = SHAPE, temperatures: tuple[float, ...] = (0,)
) -> Engine:
    """With 20 requests; their temperatures take turns."""
    with torch.device("cuda"):
        model = Decoder(shape)
    model = model.initialize(0).to("cuda", torch.bfloat16).eval()
    config = EngineConfig(
        batching="sarathi", loop=loop, tokens=256, sequences=16, cache_tokens=16384, compile=compile, check=True
    )
    engine = build_engine(model, config)
    draw = numpy_generator(0, "parts")
    for place in range(20):
        prompt = [int(token) for token in draw.integers(SHAPE.vocabulary, size=int(draw.integers(2, 250)))]
        rated = 1 if place % 4 == 0 else None
        sampling = SamplingParams(
            temperature=temperatures[place % len(temperatures)],
            max_tokens=int(draw.integers(4, 16)),
            prompt_logprobs=rated,
            seed=place,
        )
        engine.add(Request(str(place), prompt, sampling))
    return engine


def computed(engine: Engine, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of ``batch`` in its parts, and the log-probabilities of prompts. Tokens that a graph draws are those
    that the sampler draws from the same logits."""
    seen: list[Tensor] = []
    sample = engine.executor.sampler.sample

    def seeing(logits: Tensor, asked: Asked, drawn: Drawn | None, proposals: Proposals | None):
        seen.append(logits.clone())
        if drawn is not None:
            assert torch.equal(sample(logits, asked)[0].tokens, drawn.tokens)
        return sample(logits, asked, drawn, proposals)

    engine.executor.sampler.sample = seeing
    sampled = engine.executor.launch(batch)
    engine.executor.sampler.sample = sample
    if sampled is not None:
        sampled = sampled.wait()
    rated = sampled.prompt.rows.logprobs if sampled is not None and sampled.prompt is not None else []
    return (seen[0].float() if seen else torch.zeros(0, SHAPE.vocabulary)), torch.tensor(rated)


def splits(count: int) -> list[tuple[tuple[int, ...], int]]:
    """Parts of a step of ``count`` entries, and which leads. No prompt here begins like another, so any cut will do."""
    places = sorted({1, count // 2, count - 1} & set(range(1, count)))
    twos = [((place, count - place), lead) for place in places for lead in (0, 1)]
    return [*twos, ((1, count - 2, 1), 1)] if count > 2 else twos


@pytest.mark.parametrize("compile", [False, True])
def test_parts_give_the_logits_of_the_whole(compile: bool) -> None:
    """Of every step of a run that mixes prompts and decodes; with ``compile``, one of the parts replays a graph."""
    engine = engine_of(compile)
    kinds = set()
    while (batch := engine.steps.form()) is not None:
        whole, rated = computed(engine, Batch(batch.entries, batch.tables))
        for parts, lead in splits(len(batch.entries)):
            logits, own = computed(engine, Batch(batch.entries, batch.tables, parts=parts, lead=lead))
            assert logits.shape == whole.shape
            if len(whole):
                assert (logits - whole).square().mean() <= (TOLERANCE * whole.square().mean().sqrt()) ** 2
            torch.testing.assert_close(own, rated, atol=TOLERANCE * 5, rtol=0)
        if len(whole) > 1:
            # What the tolerance would not let through: another sequence's scores.
            apart = (whole[1:] - whole[:-1]).square().mean(-1).sqrt().min()
            assert apart > 5 * TOLERANCE * whole.square().mean().sqrt()
        counts = [entry.count for entry in batch.entries]
        kinds.add((min(counts) == 1, max(counts) > 1))
        engine.steps.launch(batch)
        engine.steps.publish(batch)
    assert kinds >= {(True, True), (True, False)}


@pytest.mark.parametrize("windows", [{}, {"window": 40, "windowed_layers": (0, 2, 4)}])
def test_replayed_steps_give_the_logits_of_queued_ones(
    windows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 10**9)
    engine = engine_of(compile=True, shape=SHAPE.model_copy(update=windows), temperatures=(0, 0.8))
    runner, replayed = engine.executor, set()
    graphs = runner.passes.captured
    for each in graphs[False]:
        replay = each.replay
        each.replay = lambda shape, *rest, replay=replay: (replayed.add(shape), replay(shape, *rest))[1]
    while (batch := engine.steps.form()) is not None:
        runner.passes.captured = {}
        queued, rated = computed(engine, Batch(batch.entries, batch.tables))
        runner.passes.captured = graphs
        logits, own = computed(engine, Batch(batch.entries, batch.tables))
        assert logits.shape == queued.shape
        if len(queued):
            assert (logits - queued).square().mean() <= (TOLERANCE * queued.square().mean().sqrt()) ** 2
        torch.testing.assert_close(own, rated, atol=TOLERANCE * 5, rtol=0)
        engine.steps.launch(batch)
        engine.steps.publish(batch)
    assert sum(shape.others > 0 for shape in replayed) > 1
    assert any(shape.others == 0 for shape in replayed)


def test_overlapped_steps_in_parts_finish_like_whole_ones() -> None:
    """Nothing is waited for between steps: tokens go from step to step on the device, over both streams."""

    def outputs(cut: bool) -> dict[str, list[int]]:
        engine = engine_of(compile=True, loop="overlapped")
        form = engine.steps.form
        turn = itertools.count()

        def halved(pieces: int | None = None) -> Batch | None:
            batch = form(pieces)
            if batch is not None and len(batch.entries) > 1:
                first = 1 + next(turn) % (len(batch.entries) - 1)
                batch.parts, batch.lead = (first, len(batch.entries) - first), first % 2
            return batch

        if cut:
            engine.steps.form = halved
        told: dict[str, list[int]] = {}
        while engine.busy:
            for delta in engine.step():
                told.setdefault(delta.id, []).extend(delta.tokens)
        return told

    whole, split = outputs(False), outputs(True)
    assert {id: len(tokens) for id, tokens in whole.items()} == {id: len(tokens) for id, tokens in split.items()}
    # Greedy choices may turn where two scores are within rounding; a race would turn nearly all.
    same = sum(whole[id][:2] == split[id][:2] for id in whole)
    assert same >= 0.7 * len(whole)
