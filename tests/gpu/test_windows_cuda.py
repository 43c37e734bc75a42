"""Steps with tentative tokens as CUDA graphs: the logits of the same steps queued kernel by kernel."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from penstock.core.randomness import numpy_generator
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.paged.contract import CacheShape, PagedBatch, StepShape
from penstock.ops.paged.flashinfer import FlashInfer
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.serve.run.graphs import StepGraphs, padded, taken_as, window_shapes
from penstock.serve.run.runner import Passed, Runner
from penstock.serve.run.step import Part
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.serve_model import draft_of

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)
#: Of the root mean square of the logits. Products of another number of rows are added up in another order, and those in
#: bf16 are up to 0.03 from those in fp32; one token of 60 that is seen and should not be makes 0.1 and more.
TOLERANCE = 0.05


class Compared:
    """Computes each step with windows a second time without graphs, which writes the same keys and values again.

    Args:
        runner: whose steps they are.
        most: rows of a window.

    Attributes:
        replayed: the shapes of those steps that a graph computed.
        queued: those of the others, in which no prompts were.
    """

    def __init__(self, runner: Runner, most: int) -> None:
        self._runner, self._pass_all, self._most = runner, runner._pass_all, most
        self.replayed, self.queued = list[Any](), list[Any]()
        runner._pass_all = self.both

    def both(self, parts: Sequence[Part], lead: int) -> list[Passed]:
        runner, captured = self._runner, self._runner.passes.captured
        passed = self._pass_all(parts, lead)
        if all(part.decoding for part in parts):
            return passed
        kept = [None if each.logits is None else each.logits.clone() for each in passed]
        runner.passes.captured = {}
        queued = self._pass_all(parts, lead)
        runner.passes.captured = captured
        for own, want in zip(kept, queued, strict=True):
            if own is not None:
                spread = (own.float() - want.logits.float()).abs().max() / want.logits.float().pow(2).mean().sqrt()
                assert spread < TOLERANCE
        for part in parts:
            windows = part.chooses and part.inputs.shape[1] <= (1 + runner._window) * len(part.plan.lengths)
            graphs = captured[False].windows if windows else captured[False].prompts
            own, shape = part.plan.own_shape, graphs.shape_for(part.plan)
            if shape is not None and not shape.singles:
                self.replayed.append(shape)
            elif shape is None and part.plan.starts.diff().max() <= self._most:
                self.queued.append(own)
        return passed


def model() -> Decoder:
    with torch.device("cuda"):
        made = Decoder(SHAPE)
    return made.initialize(0).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("tree", [(), (3, 2)])
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_replayed_windows_are_queued_windows(drafter, tree, monkeypatch):
    """For crowds of any size, of windows as long as they happen to be. A model drafts chains in passes that go on by
    themselves."""
    gone, again = list[StepShape](), StepGraphs.again
    monkeypatch.setattr(StepGraphs, "again", lambda self, shape: (gone.append(shape), again(self, shape))[1])
    target = model()
    drafters = {"ngram": Ngram(shortest=1), "model": Model(source="a model", tokens=4)}
    config = EngineConfig(
        sequences=16, cache_tokens=16384, draft=drafters[drafter], draft_tree=tree, controller="fixed", check=True
    )
    engine = build_engine(target, config, draft=draft_of(target, 0.02) if drafter == "model" else None)
    compared = [Compared(engine.executor, config.rows)]
    if drafter == "model":
        compared.append(Compared(engine.steps.speculation.model.runner, config.rows - 2 if tree else 2))
    lengths: dict[str, int] = {}

    def step() -> None:
        for delta in engine.step():
            lengths[delta.id] = lengths.get(delta.id, 0) + len(delta.tokens)

    for number in range(16):
        prompt = [(7 * number + place % (3 + number)) % SHAPE.vocabulary for place in range(60 + number)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
        for _ in range(3):
            step()
    while engine.busy:
        step()
    assert set(lengths.values()) == {40} and len(lengths) == 16
    onward = drafter == "model" and not tree
    for each in compared[: 1 if onward else None]:
        assert len(set(each.replayed)) > 3
        assert not each.queued, f"{each.queued} are replayed by no graph"
    assert len(set(gone)) > 3 if onward else not gone
    assert any(shape.masked for each in compared for shape in each.replayed) == bool(tree)


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_plans_of_fixed_shapes_attend_as_others_do_whichever_was_planned_before(window, trees):
    """All shapes' plans share memory, and of a batch between two shapes all rows are those of the batch itself."""
    draw, device, size, pages = numpy_generator(0, "fixed"), torch.device("cuda"), 16, 40
    blocks, heads, dim = 8 * pages, 8, 128
    shape = CacheShape(1, heads, 2, dim, blocks + 1, size, torch.bfloat16, device, frozenset({window}))
    fixed, free = (FlashInfer().open(shape) for _ in range(2))
    first = torch.from_numpy(draw.normal(size=fixed.memory.shape)).to(device, torch.bfloat16)
    shapes = window_shapes(8, 5, 10**4, trees)
    assert fixed.fix(shapes, pages)
    ways = [[-1], [-1, 0, 1], [-1, 0, 1, 2, 3], [-1, 0, 0, 1, 1, 2], [-1, 0, 1, 1]][: 5 if trees else 3]
    for _ in range(30):
        chosen = [ways[each] for each in draw.integers(len(ways), size=draw.integers(1, 9))]
        chosen.sort(key=len)
        batch = _batch(draw, chosen, blocks, pages, size)
        if not trees:
            batch = dataclasses.replace(batch, parents=None)
        fitting = [each for each in shapes if taken_as(batch, each).fits(each)]
        taken = fitting[int(draw.integers(len(fitting)))]
        given = [
            torch.from_numpy(draw.normal(size=(taken.rows, each, dim))).to(device, torch.bfloat16)
            for each in (heads, 2, 2)
        ]
        count, results = len(batch.slots), []
        for cache, planned in ((fixed, padded(batch, taken, blocks, size)), (free, batch)):
            cache.memory.copy_(first)
            cache.plan(planned)
            rows = [each if cache is fixed else each[:count].contiguous() for each in given]
            results.append(cache.attend(0, *rows, scale=dim**-0.5, window=window)[:count].float())
        torch.testing.assert_close(*results, atol=0.02, rtol=0.02)


def _batch(draw: Any, ways: list[list[int]], blocks: int, pages: int, size: int) -> PagedBatch:
    """Sequences of any length whose last tokens, with these parents among them, are new."""
    counts = [len(way) for way in ways]
    lengths = [count + int(draw.integers(1, pages * size - 8)) for count in counts]
    tables = torch.from_numpy(draw.permutation(blocks)[: len(ways) * pages].reshape(len(ways), pages)).int()
    slots = [
        int(table[place // size]) * size + place % size
        for table, length, count in zip(tables, lengths, counts, strict=True)
        for place in range(length - count, length)
    ]
    return PagedBatch(
        torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        tables,
        torch.tensor(slots),
        parents=torch.tensor([parent for way in ways for parent in way], dtype=torch.int32),
    )
