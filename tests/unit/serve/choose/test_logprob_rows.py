"""Log-probabilities as arrays: records of what somebody reads, and of nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from penstock.models import hub
from penstock.ops import logprobs as tables
from penstock.serve.build import build_engine
from penstock.serve.choose import logprobs
from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.link import wire
from penstock.serve.messages import Request
from penstock.serve.offline.gather import Gatherer
from penstock.testing.serve_model import small_model
from penstock.testing.serve_simulation import simulated_engine

TOKENS, NUMBERS = st.integers(0, 2**31 - 1), st.floats(max_value=0, width=32, allow_nan=False)


@st.composite
def records(draw: st.DrawFn) -> list[TokenLogprobs]:
    most = draw(st.integers(0, 4))
    top = st.lists(st.tuples(TOKENS, NUMBERS), min_size=most, max_size=most)
    return draw(st.lists(st.builds(TokenLogprobs, TOKENS, NUMBERS, TOKENS, top, NUMBERS, NUMBERS), max_size=6))


@given(records(), st.integers(0, 6), st.integers(0, 6), st.integers(0, 5))
def test_rows_are_a_sequence_of_records(wanted, start, stop, most):
    rows = LogprobRows.of(wanted)
    assert rows == wanted and len(rows) == len(wanted) and bool(rows) == bool(wanted)
    assert [rows[place] for place in range(len(wanted))] == wanted
    assert rows.logprobs == [each.logprob for each in wanted]
    assert rows[start:stop] == wanted[start:stop]
    assert LogprobRows.joined([rows[:stop], rows[stop:]]) == wanted
    assert LogprobRows.stacked(list(rows.table)) == wanted
    assert rows.spreads == [[each.logprob, each.entropy, each.certainty] for each in wanted]
    cut = [replace(each, top=each.top[:most]) for each in wanted[start:stop]]
    assert rows.cut(start, stop, most) == cut


def test_how_probabilities_are_spread_is_told():
    """Entropy and the distance from the even distribution, by their definitions; one token of the third is certain."""
    chances = [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]]
    scores, tokens = torch.tensor(chances).log(), torch.tensor([0, 1, 0])
    told = logprobs.Logprobs.of(scores, tokens, 0, torch.tensor([True] * 3)).rows
    for each, row in zip(told, chances, strict=True):
        assert math.isclose(each.entropy, -sum(p * math.log(p) for p in row if p), abs_tol=1e-6)
        distance = sum(0.25 * math.log(0.25 / p) if p else math.inf for p in row)
        assert math.isclose(each.certainty, distance, abs_tol=1e-6)


def test_how_probabilities_are_spread_is_computed_only_where_it_is_asked_for(monkeypatch):
    scores, tokens = torch.tensor([[0.7, 0.3], [0.2, 0.8], [1.0, 0.0]]).log(), torch.tensor([0, 1, 0])
    whole, some = (
        logprobs.Logprobs.of(scores, tokens, 1, torch.tensor(asked)).rows
        for asked in ([True] * 3, [True, False, False])
    )
    monkeypatch.setattr(tables, "_spread", None)  # may not be called
    plain = logprobs.Logprobs.of(scores, tokens, 1).rows
    assert [each[1:] for each in plain.spreads] == [[0.0, 0.0]] * 3
    assert plain == [replace(each, entropy=0.0, certainty=0.0) for each in whole]
    assert some == [whole[0], *plain[1:]] and whole[0].entropy > 0


def test_an_engine_tells_those_who_ask_how_probabilities_are_spread():
    """Beside one that does not, in the same steps; and both say the same tokens with the same log-probabilities."""
    engine = build_engine(small_model(), CONFIG, frozenset())
    found: dict[str, list[TokenLogprobs]] = {"asks": [], "plain": []}
    for id, spread in (("asks", True), ("plain", False)):
        engine.add(Request(id, [1, 2, 3], SAMPLING.model_copy(update={"spread": spread, "temperature": 1})))
    while engine.busy:
        for delta in engine.step():
            found[delta.id] += delta.logprobs or []
    assert all(each.entropy > 0 and each.certainty > 0 for each in found["asks"]) and len(found["asks"]) == 5
    assert found["plain"] == [replace(each, entropy=0.0, certainty=0.0) for each in found["asks"]]


def test_a_table_tells_the_rows_that_want_it_what_they_want():
    """As a graph makes one: each row has what it would have alone, and of others nothing is read."""
    draw = torch.Generator().manual_seed(0)
    scores, tokens = torch.randn(5, 9, generator=draw), torch.tensor([3, 0, 8, 8, 1])
    alternatives, spread = np.array([2, -1, 0, 12, -1]), np.array([True, True, False, True, False])
    wanted = torch.from_numpy(tables.wanted_by(alternatives, spread))
    assert [bool(each) for each in wanted] == [each >= 0 for each in alternatives]
    packed, own = tables.wanted_table(scores, tokens, wanted, 20), np.flatnonzero(alternatives >= 0)
    told = logprobs.Logprobs(packed, own, 12).rows
    assert len(told) == len(own)
    for place, row in enumerate(own):
        one = logprobs.Logprobs.of(scores[[row]], tokens[[row]], alternatives[row], torch.from_numpy(spread[[row]]))
        assert told.cut(place, place + 1, alternatives[row]) == one.rows


def test_rows_that_are_kept_do_not_keep_what_they_were_copied_from():
    packed = torch.zeros(3, 45, dtype=torch.int32)
    for each in (logprobs.Logprobs(packed), logprobs.Logprobs(packed, np.array([0, 2]), 4)):
        assert not np.shares_memory(each.rows.table, packed.numpy())
    assert logprobs.Logprobs(packed, np.array([0, 2]), 4).rows.table.shape == (2, 13)


def test_a_slice_shares_the_array():
    rows = LogprobRows(np.zeros((4, 7), np.int32))
    assert np.shares_memory(rows[1:3].table, rows.table)
    assert np.shares_memory(rows.cut(1, 3, 1).table, rows.table)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nobody may read a record until this is undone."""

    def read(names: list[int], values: list[float]) -> TokenLogprobs:
        raise AssertionError("a record was made")

    monkeypatch.setattr(logprobs, "_made", read)
    return monkeypatch


CONFIG = EngineConfig(tokens=64, sequences=4, block_size=16, cache_tokens=1024)
SAMPLING = SamplingParams(temperature=0, max_tokens=5, logprobs=2)


def test_an_engine_s_process_makes_no_records(unread):
    engine = simulated_engine(CONFIG)
    for number in range(4):
        engine.add(Request(str(number), [1, 2, 3], SAMPLING.model_copy(update={"logprobs": number})))
    sent = []
    while engine.busy:
        sent.append(wire.body(wire.News(engine.step())))
    unread.undo()
    told: dict[str, list[TokenLogprobs]] = {}
    for each in sent:
        for delta in wire.parse(each).deltas:
            told.setdefault(delta.id, []).extend(delta.logprobs)
    assert {id: [len(each.top) for each in own] for id, own in told.items()} == {str(n): [n] * 5 for n in range(4)}


def test_offline_results_make_records_when_they_are_read(unread):
    gatherer = Gatherer(simulated_engine(CONFIG), hub.load_tokenizer("python-1m"))
    gatherer.submit(Request("1", [1, 2, 3], SAMPLING))
    results = []
    while gatherer.pending:
        results += gatherer.step()
    unread.undo()
    (output,) = results[0].outputs
    assert len(output.logprobs) == 5
    assert output.logprobs[0] == output.logprobs[-1] == output.logprobs[1:2][0] == list(output.logprobs)[2]
    assert sorted(output.logprobs[0]) == [0, 1] and output.logprobs[0][0].rank == 1
