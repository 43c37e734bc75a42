"""Trees of drafted tokens: their shapes, which way is accepted, and what an engine has once it is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.models.heads.medusa import Medusa
from penstock.policy import create
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.choose.window import accept_path, accept_prefix
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.speculate.drafters.head import Head
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.speculate.tree import Tree, chain, depths, full, path, pruned, woven
from penstock.testing.drafting_engines import engine_with, played
from penstock.testing.serve_model import draft_of, head_of, small_model


def ways(tree: Tree) -> set[tuple[int, ...]]:
    """The texts from the newest token to each of the tree."""
    return {tuple(tree.tokens[node] for node in path(tree.parents, end)) for end in range(len(tree.tokens))}


@pytest.mark.parametrize(
    ("branches", "depth", "most", "wanted"),
    [
        ((), 3, 9, [-1, 0, 1]),
        ((), 3, 2, [-1, 0]),
        ((2,), 2, 9, [-1, -1, 0, 1]),
        ((2, 2), 2, 9, [-1, -1, 0, 0, 1, 1]),
        ((2, 2), 2, 5, [-1, -1]),
        ((1, 3), 3, 9, [-1, 0, 0, 0, 1, 2, 3]),
        ((3,), 1, 2, []),
    ],
)
def test_full_trees_have_one_generation_behind_the_other(branches, depth, most, wanted):
    assert full(branches, depth, most) == wanted


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=6), st.integers(1, 3), st.integers(1, 12))
def test_what_texts_begin_with_alike_is_there_once(texts, drafts, most):
    tree = woven(iter(texts), (drafts,) * 4, most)
    begun = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    assert ways(tree) <= begun and len(ways(tree)) == len(tree.tokens) <= most
    if drafts == 3 and most == 12 and len(begun) <= 12:  # nothing is in the way
        assert ways(tree) == begun
    if texts and len(texts[0]) <= most:
        assert not texts[0] or tuple(texts[0]) in ways(tree)


def test_a_tree_is_cut_where_something_is_not_kept():
    tree = Tree([5, 6, 7, 8], [-1, -1, 0, 2])
    assert pruned(tree, {0, 1, 2}) == Tree([5, 6, 7], [-1, -1, 0])
    assert pruned(tree, {1}) == Tree([6], [-1])
    assert chain([4, 5]) == Tree([4, 5], [-1, 0]) and depths(tree.parents) == [1, 1, 2, 3]


@given(st.data())
def test_the_way_that_was_chosen_is_accepted(data):
    """Beside a walk from token to token, for sequences with trees of different sizes in one step."""
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    width = max(1, *sizes)
    window, parents, tokens = [], [], []
    for size in sizes:
        own = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
        window.append([data.draw(st.integers(0, 2)) for _ in range(size)] + [-1] * (width - size))
        parents.append(own + list(range(size - 1, width - 1)))
        tokens.append([data.draw(st.integers(0, 2)) for _ in range(size + 1)])
    first = [0, *itertools.accumulate(map(len, tokens))][:-1]
    chosen = torch.tensor(list(itertools.chain(*tokens)))
    counts, order = accept_path(chosen, *map(torch.tensor, (first, window, parents)))
    settled = chosen[order].tolist()
    for row, (own, size) in enumerate(zip(tokens, sizes, strict=True)):
        node, wanted = 0, [own[0]]
        while True:
            behind = [each for each in range(size) if parents[row][each] == node - 1 and window[row][each] == own[node]]
            if not behind:
                break
            node = behind[0] + 1
            wanted.append(own[node])
        count = int(counts[row])
        assert settled[first[row] : first[row] + count] == wanted
        places = order[first[row] : first[row] + len(own)].tolist()
        assert all(first[row] <= place < first[row] + len(own) for place in places[:count])


@given(st.lists(st.integers(0, 1), min_size=4, max_size=4), st.lists(st.integers(0, 1), min_size=3, max_size=3))
def test_a_chain_is_accepted_as_a_tree_as_it_is_as_a_chain(tokens, window):
    given = torch.tensor(tokens), torch.tensor([0]), torch.tensor([window])
    counts, order = accept_path(*given, torch.tensor([[-1, 0, 1]]))
    assert counts.tolist() == accept_prefix(*given).tolist() and order.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("verifier", [pytest.param("exact_match", marks=pytest.mark.slow), "accept_residual"])
def test_a_tree_of_one_way_does_what_a_chain_does(verifier):
    """Step for step: the same tokens, drafted and accepted, and the same log-probabilities."""
    told = []
    for tree in ((), (1,)):
        engine = engine_with(
            Model(source="a model", tokens=3), verifier=create("speculate.verifier", verifier), tree=tree
        )
        deltas = played(engine, 0, times=1)
        told.append(
            {
                name: [(each.tokens, each.drafted, each.accepted, each.finish) for each in own]
                for name, own in deltas.items()
            }
        )
    assert told[0] == told[1]


@pytest.mark.parametrize("verifier", ["k_seq", "recursive"])
def test_a_token_that_was_drawn_twice_for_a_place_is_there_once(verifier):
    drafter = Model(source="a model", tokens=3)
    engine = engine_with(drafter, verifier=create("speculate.verifier", verifier), tree=(3, 3))
    launch, trees = engine.executor.launch, []

    def launched(batch, *given, **more):
        trees.extend((each.tree.parents, each.window) for each in batch.entries if each.parents)
        return launch(batch, *given, **more)

    engine.executor.launch = launched
    played(engine, 0, times=1)
    assert trees
    for parents, window in trees:
        children = list(zip(parents, window, strict=True))
        assert len(set(children)) == len(children)


DRAFTERS = {
    "ngram": (Ngram(shortest=1), lambda: None),
    "model": (Model(source="a model", tokens=3), lambda: draft_of(small_model(), 0.2)),
    "exit": (Head(source="a head", tokens=3), lambda: head_of(small_model())),
    "medusa": (Head(source="a head", tokens=3), lambda: head_of(small_model(), Medusa(heads=3))),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_in_the_cache_after_rejected_ways_is_what_a_clean_run_has(name):
    """Keys, values and hidden states; but for rounding, since softmaxes have summed them up in another order."""
    drafter, make = DRAFTERS[name]
    sizes = {"sequences": 4, "tokens": 64, "block_size": 4, "cache_tokens": 800, "check": True}
    config = EngineConfig(attention="reference", draft=drafter, draft_tree=(3, 2), controller="fixed", **sizes)
    engine = build_engine(small_model(), config, draft=make())
    runner, found = engine.executor, {}
    for drafts in (False, True):
        engine.memory.pool.forget()
        texts = {str(number): [3, 1, 4, 1, 5, number] for number in range(4)}
        for id, prompt in texts.items():
            sampling = SamplingParams(temperature=int(id) % 2, max_tokens=20, ignore_eos=True, drafts=drafts)
            engine.add(Request(id, list(prompt), sampling))
        while engine.busy:
            for delta in engine.step():
                texts[delta.id] += delta.tokens
        pool, held = engine.memory.pool, []
        for text in texts.values():
            blocks = torch.tensor(pool.match(text, len(text)))
            assert len(blocks) >= (len(text) - 5) // 4
            slots = (blocks[:, None] * 4 + torch.arange(4)).flatten()
            held += list(runner.cache.read(slots))
            held += [] if runner.hidden is None else [runner.hidden._states.flatten(0, 1)[slots]]
        known = {block for text in texts.values() for block in pool.match(text, len(text))}
        assert known == set(pool._nodes)
        found[drafts] = texts, held
    assert found[True][0] == found[False][0]
    for own, clean in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(own, clean, rtol=0, atol=1e-4)
    now = engine.snapshot()
    assert 0 < now.accepted_tokens < sum(now.drafted_at) < now.drafted_tokens
