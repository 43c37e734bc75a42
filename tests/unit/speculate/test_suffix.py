"""Drafts by what any text of an engine has said, beside a search through all of them."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Request
from penstock.speculate.drafters.suffix import Suffix
from penstock.speculate.texts import PLACES, Texts
from penstock.speculate.tree import path
from penstock.testing.drafting_engines import engine_with
from penstock.testing.speculate_drafter import check_engine

WORDS = st.lists(st.integers(0, 3), max_size=17)


def searched(text: list[int], others: list[list[int]], drafter: Suffix, most: int) -> list[int]:
    """What followed most often where the longest end of ``text`` stands, in it or in ``others``, the latest first."""
    places = [(each, end) for each in (*others, text) for end in range(1, len(each))]
    alike = {place: _agreed(text, *place) for place in [(tuple(each), end) for each, end in places]}
    best = max((agreed for agreed in alike.values() if agreed >= drafter.shortest), default=0)
    going = [(each, end) for each, end in reversed(places) if best and _agreed(text, each, end) == best]
    found, chance = [], 1.0
    while len(found) < min(most, drafter.tokens, math.ceil(drafter.reach * best)) and going:
        counts = Counter(each[end] for each, end in going)
        token = max(counts, key=lambda one: counts[one])
        chance *= counts[token] / len(going)
        if chance < drafter.least:
            break
        found.append(token)
        going = [(each, end + 1) for each, end in going if each[end] == token and end + 1 < len(each)]
    return found


def _agreed(text: list[int], other: list[int] | tuple[int, ...], end: int) -> int:
    """How many tokens before the place are those at the end of ``text``."""
    length = 0
    while length < min(end, len(text)) and other[end - length - 1] == text[len(text) - length - 1]:
        length += 1
    return length


@settings(max_examples=300)
@given(WORDS, st.integers(1, 3), st.integers(1, 20), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0, 0.3, 0.6]))
def test_it_drafts_what_a_search_through_the_text_finds(text, shortest, most, reach, least):
    drafter = Suffix(shortest=shortest, reach=reach, least=least)
    assert drafter.start(text).propose(most) == searched(text, [], drafter, most)


@settings(max_examples=100)
@given(WORDS, WORDS, st.integers(0, 17))
def test_and_through_the_texts_of_others(said, text, begun):
    """Of which one ended, and of which the other goes on."""
    drafter = Suffix(shortest=3, least=0)
    start = drafter.opened()
    start(said)
    draft = start(text[:begun])
    draft.extend(text[begun:])
    assert draft.propose(20) == searched(text, [said], drafter, 20)
    assert Suffix(shortest=3, least=0, kept=0).opened()(text).propose(20) == searched(text, [], drafter, 20)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=60), st.integers(1, 20))
def test_the_oldest_are_forgotten_without_a_trace(steps, kept):
    """Three texts go on in any order: what is known is where runs stand in those that are left."""
    texts = Texts(2, kept)
    known = [texts.begin() for _ in range(3)]
    for which, token in steps:
        texts.append(known[which], token)
    left = [text for text in known if not text.forgotten]
    assert known[-1] in left and (len(left) == 1 or sum(map(len, left)) <= kept)
    places = {(run, id(text), end) for run, all_of in texts._places.items() for text, end in all_of}
    wanted = {(tuple(text[end - 2 : end]), id(text), end) for text in left for end in range(2, len(text) + 1)}
    assert places <= wanted
    assert all(len(each) for each in texts._places.values())
    counts = Counter(run for run, *_ in wanted)
    assert Counter(run for run, *_ in places) == {run: min(PLACES, count) for run, count in counts.items()}


def test_a_token_is_drafted_as_far_as_all_before_it_are_likely_too():
    """Of three places two go on with 1, of which one goes on with 3."""
    text = [10, 9, 1, 2, 11, 9, 1, 3, 12, 9, 4, 5, 13, 9]
    for least, wanted in ((0.3, [1, 3]), (0.4, [1]), (0.7, [])):
        assert Suffix(shortest=1, least=least).start(text).propose(2) == wanted


def test_no_way_of_a_tree_goes_further_than_what_agrees_reaches():
    said = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 3, 5, 5, 5, 5, 5, 5, 5]
    for reach, shortest in ((1.0, 1), (2.0, 2), (0.5, 1)):
        draft = Suffix(shortest=shortest, reach=reach, least=0).start([*said, 2, 3])
        tree = draft.grow([3], 9, 64)
        found = {tuple(tree.tokens[node] for node in path(tree.parents, end)) for end in range(len(tree.tokens))}
        assert max(map(len, found)) == math.ceil(2 * reach), "two tokens agree at most"
        if shortest == 1:  # another way is that from where one agrees
            others = [way for way in found if way[0] == 5]
            assert others and max(map(len, others)) <= math.ceil(reach)


def test_a_request_is_drafted_what_another_one_said():
    engine = engine_with(Suffix(shortest=1, reach=4))
    taken = []
    for number in range(2):
        before = engine.snapshot()
        engine.add(Request(str(number), [5, 9, 2, 7], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))
        while engine.busy:
            engine.step()
        taken.append(engine.snapshot().sequence_steps - before.sequence_steps)
    assert 2 * taken[1] <= taken[0]


def test_drafts_are_accepted_where_text_repeats_itself():
    now = check_engine(Suffix(shortest=1)).snapshot()
    assert 0 < now.accepted_tokens <= now.drafted_tokens
    assert now.steps < now.output_tokens
