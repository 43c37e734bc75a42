"""Two models on one set of tables: what is in the caches after drafts were rejected, and what the second one knows."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import HeadModule
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.serve.opening import load_draft
from penstock.serve.run.draft import Coverage
from penstock.speculate.contract import Drafter
from penstock.speculate.drafters.head import Head
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.serve_model import SHAPE, draft_of, head_of, small_model

PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def texts(engine: Engine) -> list[list[int]]:
    """What the engine has made of some prompts, greedily and not."""
    found = {}
    for number in range(6):
        prompt = [*PREFIX[: 4 + number], number]
        found[str(number)] = prompt[:]
        engine.add(
            Request(str(number), prompt, SamplingParams(temperature=number % 2, seed=1, max_tokens=22, ignore_eos=True))
        )
    while engine.busy:
        for delta in engine.step():
            found[delta.id] += delta.tokens
    return list(found.values())


def contents(engine: Engine, text: list[int]) -> torch.Tensor:
    """Keys and values of the blocks in which the prefix tree has the beginning of ``text``."""
    blocks = engine.memory.pool.match(text, len(text))
    return engine.executor.cache._memory[:, blocks].clone()


def drafting(drafter: Drafter, noise: float) -> Decoder | HeadModule:
    """What drafts for the small model, and is sometimes wrong."""
    return head_of(small_model()) if drafter.head else draft_of(small_model(), noise)


@pytest.mark.parametrize("drafter", [Ngram(shortest=1), Model(source="a model"), Head(source="a head")])
def test_blocks_after_rejected_drafts_are_those_of_a_clean_run(drafter):
    sizes = {"sequences": 4, "tokens": 64, "block_size": 4, "cache_tokens": 800, "check": True}
    engines = []
    for options in ({}, {"draft": drafter, "controller": "fixed"}):
        config = EngineConfig(deterministic=True, **sizes, **options)
        # A deterministic engine replaces its model's layers.
        engines.append(build_engine(copy.deepcopy(small_model()), config, draft=drafting(drafter, 0.2)))
    clean, drafted = engines
    wanted, found = (texts(engine) for engine in engines)
    assert found == wanted
    now = drafted.snapshot()
    assert 0 < now.accepted_tokens < now.drafted_tokens
    for text in found:
        held = contents(drafted, text)
        assert held.shape[1] >= (len(text) - 6) // 4  # of the last tokens nobody needs keys
        assert torch.equal(held, contents(clean, text))


@pytest.mark.parametrize("drafter", [Ngram(shortest=1), Model(source="a model"), Head(source="a head")])
def test_the_prefix_tree_knows_nothing_but_texts(drafter):
    config = EngineConfig(
        draft=drafter, controller="fixed", sequences=4, tokens=32, block_size=2, cache_tokens=200, check=True
    )
    engine = build_engine(small_model(), config, draft=drafting(drafter, 0.3))
    found = texts(engine)
    assert engine.snapshot().accepted_tokens < engine.snapshot().drafted_tokens
    pool = engine.memory.pool
    known = {block for text in found for block in pool.match(text, len(text))}
    assert known == set(pool._nodes)


class Book:
    """A coverage beside a book of single slots: which version of its token the cache of the drafting model has. Of two
    sequences, in slots 0 and 1, that have some of the blocks each."""

    size = 3

    def __init__(self, blocks: int, tables: list[list[int]]) -> None:
        sampling = SamplingParams()
        self.coverage, self.tables = Coverage(blocks, self.size), np.array(tables)
        self.sequences = [Sequence(Request("", [0], sampling), 0, sampling, [0], 1, place) for place in range(9)]
        self.target, self.draft = np.zeros((blocks, self.size), int), np.full((blocks, self.size), -1)
        self.version = 0

    def slots(self, row: int, start: int, end: int) -> list[tuple[int, int]]:
        return [(self.tables[row][place // self.size], place % self.size) for place in range(start, end)]

    def overwrite(self, row: int, start: int, end: int, arrival: int = 0) -> None:
        """The target writes [start, end)."""
        self.version += 1
        for slot in self.slots(row, start, end):
            self.target[slot] = self.version
        self.coverage.overwrite([Entry(self.sequences[arrival], row, start, end - start, 0)], self.tables)

    def known(self, row: int, most: int) -> int:
        """How many of the first ``most`` tokens the drafting model has, which the coverage says too."""
        slots = self.slots(row, 0, most)
        known = next((place for place, slot in enumerate(slots) if self.draft[slot] != self.target[slot]), most)
        assert self.coverage.lengths(self.tables[[row]], np.array([most])) == [known]
        return known

    def drafted(self, row: int, end: int) -> None:
        """The drafting model computes all that it lacks before ``end``."""
        known = self.known(row, end)
        if known == end:
            return
        for slot in self.slots(row, known, end):
            self.draft[slot] = self.target[slot]
        self.coverage.extend(self.tables[row], known, end)

    def copy(self, source: int, target: int) -> None:
        for book in (self.target, self.draft):
            book[target] = book[source]
        self.coverage.copy([source], [target])

    def restored(self, block: int) -> None:
        """The target reads what is in ``block`` from elsewhere."""
        self.version += 1
        self.target[block] = self.version
        self.coverage.forget([block])


@settings(max_examples=200)
@given(st.data())
def test_coverage_says_what_was_computed_last(data):
    """Texts grow, are cut back, end and make room for others; blocks are copied and restored."""
    book = Book(9, [list(data.draw(st.permutations(range(4)))), [4, 5, 6, 7]])
    lengths, arrivals = [0, 0], [0, 1]
    for _ in range(data.draw(st.integers(2, 13))):
        row = data.draw(st.sampled_from([0, 0, 0, 1]))
        match data.draw(st.sampled_from(["write", "write", "write", "draft", "copy", "restore", "end"])):
            case "write":
                start = data.draw(st.integers(0, min(lengths[row], 11)))
                end = data.draw(st.integers(start + 1, min(start + 5, 12)) | st.just(start + 1))
                book.overwrite(row, start, end, arrivals[row])
                lengths[row] = end
            case "draft" if lengths[row]:
                book.drafted(row, lengths[row])
            case "copy":
                # Into a block of its own, as that of a fork is, which goes on behind the same beginning.
                place = data.draw(st.integers(0, 3))
                book.copy(book.tables[0][place], book.tables[1][place])
                begin = place * book.size
                lengths[1] = min(lengths[1], max(begin, min(lengths[0], begin + book.size)))
            case "restore":
                book.restored(book.tables[row][data.draw(st.integers(0, 3))])
            case "end":
                lengths[row], arrivals[row] = 0, max(arrivals) + 1 if max(arrivals) < 8 else arrivals[row]
        for each in (0, 1):
            book.known(each, lengths[each])


STEPS = [(start, end) for start in range(4) for end in range(start + 1, 5)]


def test_coverage_is_right_of_every_short_course_of_steps():
    """Each step writes some tokens, whether the model drafts behind it or not."""
    for course in itertools.product(itertools.product(STEPS, (False, True)), repeat=3):
        for last in ((2, 3), (3, 4), (4, 5)):
            book, length = Book(2, [[0, 1]]), 0
            for (start, end), drafts in (*course, (last, False)):
                if start > length:
                    break
                book.overwrite(0, start, end)
                length = end
                if drafts:
                    book.drafted(0, end)
                book.known(0, length)


def test_a_slot_s_next_sequence_is_not_taken_for_the_last_one():
    """It may have been given a block that the drafting model knows, and write what comes in that."""
    book = Book(3, [[1, 2]])
    book.overwrite(0, 0, 3)
    book.drafted(0, 3)
    book.tables[0] = [0, 2]
    book.overwrite(0, 0, 2, arrival=1)
    book.tables[0] = [1, 2]
    book.overwrite(0, 2, 3, arrival=2)
    assert book.known(0, 3) == 2


def test_a_vocabulary_that_differs_is_refused_with_both_sizes(tmp_path):
    folder = hub.resolve("python-6m")
    tokenizer = hub.load_tokenizer(folder)
    other = tmp_path / "other"
    hub.save(small_model(), other)
    with pytest.raises(
        UsageError, match=f"{SHAPE.vocabulary} tokens.* one of {hub.read_config(folder).vocabulary:,}"
    ) as raised:
        load_draft(str(other), folder, tokenizer, torch.device("cpu"), torch.float32)
    assert "ngram" in raised.value.hint


def test_a_sequence_longer_than_the_drafting_model_s_context_is_drafted_no_more():
    short = draft_of(small_model(), 0.0)
    short.config = SHAPE.model_copy(update={"context": 24})
    config = EngineConfig(draft=Model(source="a model"), controller="fixed", sequences=2, cache_tokens=400, check=True)
    engine = build_engine(small_model(), config, draft=short)
    engine.add(Request("1", PREFIX, SamplingParams(temperature=0, max_tokens=40)))
    told: list[int] = []
    while engine.busy:
        for delta in engine.step():
            told += delta.tokens
            if len(PREFIX) + len(told) - len(delta.tokens) > 24:
                assert not delta.drafted
    assert len(told) == 40
    assert engine.snapshot().accepted_tokens == engine.snapshot().drafted_tokens > 8
