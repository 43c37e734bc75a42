"""Probes as rows of a step: what they see, what is kept of them, and what is not."""

from __future__ import annotations

import torch

from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.run.planner import with_probes
from penstock.speculate.drafters.ppd import ParallelPromptDecoding
from penstock.speculate.tree import path
from penstock.testing.drafting_engines import engine_with
from penstock.testing.serve_model import SHAPE, head_for, small_model
from penstock.testing.speculate_drafter import circling_model

PROBING = ParallelPromptDecoding(source="a head")


def opened(model: Decoder | None = None) -> tuple[Engine, Decoder]:
    """An engine that drafts by probes, and its model to which they are tokens."""
    model = model or small_model()
    head = head_for(PROBING, model)
    return engine_with(PROBING, model, draft=head), head.prompted(model)


def played(engine: Engine, **sampling) -> dict[str, list[int]]:
    for number in range(3):
        prompt = [(5 * place + number) % SHAPE.vocabulary for place in range(4 + 5 * number)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=20, **sampling)))
    texts: dict[str, list[int]] = {}
    while engine.busy:
        for delta in engine.step():
            texts.setdefault(delta.id, []).extend(delta.tokens)
    return texts


def test_probes_stand_in_a_row_behind_their_tokens():
    # Two tokens behind the newest one, of which the second has a child; probes behind that and the newest.
    assert with_probes([-1, -1, 1], [2, 0, 0, 3]) == [-1, -1, 1, -1, 3, 2, 5, 6]
    assert with_probes([], [1]) == [-1]
    assert with_probes([-1, 0], ()) == [-1, 0]


@torch.no_grad()
def test_rows_of_a_tree_and_their_probes_are_those_of_each_way_alone(monkeypatch):
    engine, prompted = opened()
    runner, compared = engine.executor, {"tokens": 0, "probes": 0}
    compute, launch = runner._pass, runner.launch
    last = []

    def passing(part, lane=0):
        last[:] = [compute(part, lane)]
        return last[0]

    def launching(batch: Batch):
        sampled = launch(batch)
        (passed,) = last
        row = probe = 0
        for entry in batch.entries:
            tree = entry.tree
            for node in range(-1, entry.scored - 1):
                text = [*entry.sequence.tokens, *(tree.tokens[each] for each in path(tree.parents, node))]
                count = entry.probes[node + 1] if entry.probes else 0
                rows = torch.tensor([[*text, *range(-1, -1 - count, -1)]])
                hidden = prompted(rows, CausalRows.of(rows.shape[1])).hidden[0, len(text) - 1 :]
                torch.testing.assert_close(passed.logits[row], prompted.logits(hidden[0]), rtol=0, atol=1e-4)
                if count:
                    torch.testing.assert_close(passed.probes[probe : probe + count], hidden[1:], rtol=0, atol=1e-4)
                row, probe = row + 1, probe + count
                compared["tokens"] += node >= 0
                compared["probes"] += count
        return sampled

    monkeypatch.setattr(runner, "_pass", passing)
    monkeypatch.setattr(runner, "launch", launching)
    played(engine)
    assert min(compared.values()) > 50


def test_nothing_of_probes_stays_in_the_cache():
    engine, _ = opened(circling_model())
    step, seen = engine.steps.publish, []

    def publishing(batch: Batch):
        deltas = step(batch)
        for entry in batch.entries:
            held = entry.sequence.held
            if entry.probes and held is not None and not entry.sequence.in_flight:
                seen.append(sum(entry.probes))
                assert len(held.blocks) == -(-held.places // engine.memory.pool.block_size)
                assert held.computed == len(entry.sequence.tokens) - 1
        return deltas

    vars(engine.steps)["publish"] = publishing
    played(engine)
    assert len(seen) > 10 and engine.snapshot().held == 0


def test_a_prediction_is_drafted_in_place_of_what_probes_guess():
    plain = played(engine_with(None))
    engine, _ = opened()
    found = played(engine, prediction=tuple(plain["1"]))
    assert found == plain
    assert engine.snapshot().accepted_tokens > 10


def test_nothing_is_guessed_behind_a_text_that_was_changed():
    engine, _ = opened()
    engine.add(Request("0", [1, 2, 3], SamplingParams(temperature=0, max_tokens=30)))
    while not any(each.held.probed for each in engine.memory.running):
        engine.step()
    engine.truncate("0", len(engine.memory.running[0].tokens) - 1)
    assert engine.memory.running[0].held.probed == 0
    engine.fork("0", Request("1", list(engine.memory.running[0].tokens), SamplingParams(temperature=0, max_tokens=5)))
    assert [each.held.probed for each in engine.memory.running] == [0, 0]
    while engine.busy:
        engine.step()
