"""The law of ``kv.policy``: caches that are compressed inside of the engine, beside one that is kept by hand.

What each clause is there to catch:

- :func:`check_sizes`: a policy that is due at a place which it has passed, or that keeps more than it says, or than its
  budget;
- :func:`check_rows`: layers and heads that are computed together and touch each other, tokens that change their order,
  results of another size or dtype, a request for fewer tokens that does not give fewer;
- :func:`check_shared`: a layer that is given another one's norms, and directions that come from nowhere;
- :func:`check_strong`: a key that is packed, and that a query likes more than all others, and does not see;
- :func:`check_layers`: a layer that sees tokens of another one, in another order, or with the values of others;
- :func:`check_selected`: tokens that read more than the budget, or others than the blocks that are worth the most to
  them; what a token reads that depends on what is computed beside it; a key that a query likes more than all others,
  and does not read;
- :func:`check_copied`: blocks that are copied without what the host's memory has beside them;
- :func:`check_limit`: tokens that are not those of the full cache where the policy says that they are;
- :func:`check_engine`: a sequence whose tokens depend on the batch, on chunks of its prompt, on blocks that it shares,
  on a fork, or on having been preempted; blocks that are lost, or not given back; a place that is taken for a
  position; queries that are another sequence's, or too old; what is remembered of one token and told of another;
- :func:`check_together`: caches that are compressed together and take each other's tokens, queries, or what is
  remembered; one that is read after another has written there; sums whose order depends on who else is there;
- :func:`check_continued`: blocks of what was said that are taken for those of a prompt, or the other way round, where
  they are not the same;
- :func:`check_whole`: a request that is to keep all of its cache, and does not, or goes on from what is left of
  another one's;
- :func:`check_held`: a cache that grows beyond what the policy says;
- :func:`check_pressure`: a cache that is compressed although nothing presses, or only once somebody was preempted; one
  that is computed again and not compressed where it was, or amidst what was said already; queries that drafts have
  taken the places of; a fork that does not know where its parent's cache was compressed.

The oracle (:class:`~penstock.testing.kept_scores.KeptScores`) has the keys and values of one sequence, a list for each
layer, and computes attention by its definition, in float64; of the policy it asks when it is due and what it makes of a
cache. Each policy's own rule is tested by brute force beside this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict

import numpy as np
import torch
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator, torch_generator
from penstock.models.config import DecoderConfig
from penstock.models.paged import cache_shape
from penstock.ops.paged.contract import CacheShape, PagedBatch, PagedCache
from penstock.ops.paged.layered import LayeredTokens
from penstock.ops.paged.paired import PairedLayers
from penstock.ops.paged.reference import Reference
from penstock.ops.paged.selection import BlockSelection
from penstock.ops.paged.view import Packed
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.compaction import Compaction, Compactor
from penstock.serve.kv.policies.contract import Budgeted, Cached, CachePolicy, Kept
from penstock.serve.kv.policies.full import Full
from penstock.serve.messages import Request
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.alike import alike
from penstock.testing.engine.accounts import expected
from penstock.testing.engine.crowds import crowd
from penstock.testing.engine.machine import machine_of
from penstock.testing.engine.requests import numbers
from penstock.testing.kept_scores import best_blocks, packed_of
from penstock.testing.paged_scene import attention as attended
from penstock.testing.reference import greedy
from penstock.testing.serve_model import SHAPE, small_model


def check(policy: CachePolicy, crowds: int = 3, examples: int = 6, steps: int = 20) -> None:
    """Asserts the law, for the ``policy`` with small budgets."""
    check_sizes(policy)
    check_rows(policy)
    check_shared(policy)
    check_strong(policy)
    check_layers(policy)
    check_selected(policy)
    check_copied(policy)
    check_limit(policy)
    check_together(policy)
    check_held(policy)
    check_continued(policy)
    check_whole(policy)
    check_engine(policy, crowds, examples, steps)
    check_pressure(policy, crowds, examples, steps)


def tight(policy: CachePolicy, **more: object) -> CachePolicy:
    """``policy`` with a budget that small texts exceed, where it has one."""
    known = type(policy).model_fields
    small = {"budget": 0.4, "every": 5, "history": 4, "window": 4, "recent": 2, "sinks": 2, "pool": 3}
    small |= {"start": 0.0, "retained": 0.2, "rank": 3, "chunk": 2, "outliers": 1, "block": 2, "newest": 1}
    own = {name: value for name, value in {**small, **more}.items() if name in known}
    if isinstance(known.get("recent") and known["recent"].default, float):
        own.pop("recent")
    return type(policy).model_validate({**policy.model_dump(), **own})


def check_sizes(policy: CachePolicy) -> None:
    """Asserts that compressions follow each other, and each leaves as much as it says, and no more than a budget."""
    policies = (policy, tight(policy), tight(policy, whole_prompt=False), tight(policy, budget=9))
    for each in [each.fitted(_model(8, 64)) for each in policies]:
        for prompt in (1, 7, 40):
            computed = dropped = 0
            first = each.due(prompt, 0, 0)
            assert first is None or first >= prompt or not getattr(each, "whole_prompt", True), "a prompt is cut"
            while (due := each.due(prompt, computed, dropped)) is not None and due < 200:
                left = each.keeps(due)
                assert computed < due, "a compression is due that is past"
                assert 0 < left < due - dropped, f"of {due - dropped} tokens {left} are kept"
                if isinstance(each, Budgeted):
                    most = max(each.least, each.budget if each.budget > 1 else math.ceil(each.budget * due))
                    assert left <= most, f"{left} tokens are kept where the budget is {most}"
                computed, dropped = due, due - left


def _model(layers: int, head_dim: int) -> DecoderConfig:
    return SHAPE.model_copy(update={"layers": layers, "head_dim": head_dim})


def check_rows(policy: CachePolicy, seeds: int = 6) -> None:
    """Asserts that each head is compressed as if it were alone, and each layer where they share nothing, to as many
    places, in the cache's dtype."""
    chosen = tight(policy).fitted(_model(4, 8))
    if not chosen.compresses:
        return
    view = chosen.view
    count, layers = (11, list(range(4))) if view is None else (chosen.keeps(25), [slice(None)])
    heads = [slice(0, 1), slice(1, 2)] if view is None or view.head_by_head else []
    assert not (view is not None and (chosen.remembers or (chosen.watches and view.whole)))
    for seed in range(seeds):
        draw = torch_generator(seed, "testing/kv_policy")
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        keys, values = (torch.randn(4, 2, 25, 8, generator=draw).to(dtype) for _ in range(2))
        watched = torch.rand(4, 2, chosen.watches, 25, generator=draw) if chosen.watches else None
        drawn = torch.rand(4, 2, 25, generator=draw)
        whole = chosen.compress(Cached(keys, values, watched, drawn), count)
        assert whole.keys.shape == whole.values.shape == (4, 2, count, 8) and whole.keys.dtype == dtype
        assert (whole.drawn is not None) == chosen.remembers
        for layer in layers:
            for head in heads:
                own = Cached(
                    keys[layer, head],
                    values[layer, head],
                    None if watched is None else watched[layer, head],
                    drawn[layer, head],
                )
                _same(chosen.compress(own, count), whole, layer, head)


def check_shared(policy: CachePolicy) -> None:
    """Asserts that layers which share keys and values have vectors of the norms that were theirs, and that nothing
    changes where all layers have the same directions."""
    chosen = tight(policy).fitted(_model(4, 8))
    paired = chosen.view
    if not isinstance(paired, PairedLayers):
        return
    draw = torch_generator(0, "testing/kv_policy/shared")
    keys, values = (torch.randn(4, 2, 25, 8, generator=draw) for _ in range(2))

    def found(vectors: Tensor) -> Tensor:
        kept = chosen.compress(Cached(vectors, values), chosen.keeps(25))
        return paired.restored(packed_of(chosen, kept, 25))[0]

    norms, kept = (torch.linalg.vector_norm(each, dim=-1).sort(-1).values for each in (keys, found(keys)))
    torch.testing.assert_close(kept, norms, msg="a vector has another norm than it had")
    alike = keys[:1] * torch.arange(1, 5).view(4, 1, 1, 1)
    torch.testing.assert_close(found(alike).sort(2).values, alike.sort(2).values, msg="equal directions are not kept")


def check_together(policy: CachePolicy, seeds: int = 4) -> None:
    """Asserts that caches which are compressed in one stage become what they become one after the other, bit for bit:
    of equal and of unequal lengths, of texts shorter than what is watched, compressed before or not, into blocks that
    others have given up, or that one before has lost again, and where not all of it fits into memory at a time."""
    model = _model(4, 8).model_copy(update={"heads": 6})
    chosen = tight(policy, every=8, budget=9).fitted(model)
    if not chosen.compresses:
        return
    for seed in range(seeds):
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        shape = CacheShape(4, 6, 2, 8, 120, 2, dtype, torch.device("cpu"), view=chosen.view)
        works = _works(chosen, seed)
        assert len(works) == 7 and not set(works[2].targets).isdisjoint(works[-1].targets)
        together, apart = (_compactor(chosen, shape, seed) for _ in range(2))
        if seed > 1:
            together[0]._most = 3000  # so that neither all caches nor all layers fit
        together[0].compact(works)
        for work in works:
            apart[0].compact([work])
        everywhere = torch.arange(shape.blocks * shape.block_size)
        pairs = [*zip(*(each[1].codes(everywhere) for each in (together, apart)), strict=True)]
        if chosen.remembers:
            pairs.append((together[0]._drawn, apart[0]._drawn))
        assert all(torch.equal(*pair) for pair in pairs), (
            "a cache is another one for having been compressed with others"
        )


def _works(policy: CachePolicy, seed: int) -> list[Compaction]:
    """Seven caches that are compressed, in blocks of two, the last of them into blocks that the third one has lost."""
    draw = numpy_generator(seed, "testing/kv_policy/together")
    free, works = [int(block) for block in draw.permutation(120)], list[Compaction]()

    def places(blocks: list[int], count: int) -> np.ndarray:
        return (np.array(blocks, np.int64)[:, None] * 2 + np.arange(2)).reshape(-1)[:count]

    # Where layers share what lies in places, or lay it end to end, that may be any numbers.
    before = 18 if isinstance(policy.view, PairedLayers | LayeredTokens) else 0
    packed = 0 if policy.view is None else policy.view.places(before)
    for slot, (computed, again) in enumerate([(26, 0), (26, 0), (19, 0), (26, 1), (26, 1), (7, 0), (26, 0)]):
        count = packed + computed - before if again and packed else computed
        if slot == 4 and policy.view is None:
            computed += 8  # of a longer text as much is left
        kept = policy.keeps(computed)
        sources = [free.pop() for _ in range(-(-count // 2))]
        targets = [free.pop() for _ in range(-(-kept // 2))]
        if slot == 6:
            lost = [int(place) // 2 for place in works[2].targets[::2]]
            targets[: len(lost)] = lost
        elif slot % 2:
            free += sources  # whoever comes next may write there
        known = int(draw.integers(count)) if again else 0
        works.append(Compaction(slot, computed, known, before * again, places(sources, count), places(targets, kept)))
    return works


def _compactor(policy: CachePolicy, shape: CacheShape, seed: int) -> tuple[Compactor, PagedCache]:
    """One with a cache of random numbers, the same for the same ``seed``."""
    cache, draw = Reference().open(shape), torch_generator(seed, "testing/kv_policy/together")
    compactor = Compactor.of(cache, policy, slots=7, tokens=7 * max(1, policy.watches))
    assert compactor is not None
    everywhere = torch.arange(shape.blocks * shape.block_size)
    rows = (torch.randn(4, 2, len(everywhere), 8, generator=draw).to(shape.dtype) for _ in range(2))
    cache.write(everywhere, *rows)
    if cache.watch is not None:
        one = torch.ones(1, dtype=torch.int32)
        slots = torch.arange(7 * policy.watches)
        cache.watch.plan(PagedBatch(one, one, one.view(1, 1), slots, watched=1 + slots), 0)
        for layer in range(4):
            query = torch.randn(len(slots), 6, 8, generator=draw)
            cache.watch.note(layer, query.to(shape.dtype), 0.2 + 0.1 * layer)
    if policy.remembers:
        compactor._drawn.copy_(torch.rand(compactor._drawn.shape, generator=draw))
    return compactor, cache


def _same(alone: Kept, whole: Kept, layer: int | slice, head: slice) -> None:
    pairs = [(alone.keys, whole.keys), (alone.values, whole.values)]
    if alone.drawn is not None and whole.drawn is not None:
        pairs.append((alone.drawn, whole.drawn))
    for one, other in pairs:
        torch.testing.assert_close(one, other[layer, head])


def check_strong(policy: CachePolicy) -> None:
    """Asserts that a token which a query likes more than all others is what it sees, wherever it is packed."""
    chosen = tight(policy).fitted(_model(4, 8))
    view = chosen.view
    if view is None or not view.whole:
        return
    draw = torch_generator(0, "testing/kv_policy/strong")
    for place in range(chosen.packed(25)):
        keys, values = (torch.randn(4, 2, 25, 8, generator=draw) for _ in range(2))
        query = torch.randn(1, 4, 8, generator=draw)
        keys[:, :, place] = 40 * torch.nn.functional.normalize(query[0, ::2], dim=-1)
        values[:, :, place] = torch.randn(2, 8, generator=draw)
        packed = packed_of(chosen, chosen.compress(Cached(keys, values), chosen.keeps(25)), 25)
        for layer in range(4):
            (seen,) = view.seen(layer, query, packed, 8**-0.5)
            whole = torch.ones(1, seen.keys.shape[1], dtype=torch.bool)
            found = attended(query, seen.keys[0], seen.values[0], whole, scale=8**-0.5)[0, ::2]
            near = torch.linalg.vector_norm(found - values[layer, :, place]) < 0.05
            assert near, f"token {place} of a cache, which a query likes more than all others, is not what it sees"


def check_layers(policy: CachePolicy, seeds: int = 4) -> None:
    """Asserts that where layers keep tokens of their own, some more than others, each sees tokens of its own, in the
    order of the text, the newest among them, and each with its own value."""
    chosen = tight(policy).fitted(_model(4, 8))
    view = chosen.view
    if view is None or view.whole:
        return
    for seed in range(seeds):
        draw = torch_generator(seed, "testing/kv_policy/layers")
        keys, values = (torch.randn(4, 2, 25, 8, generator=draw) for _ in range(2))
        watched = torch.rand(4, 2, chosen.watches, 25, generator=draw) if chosen.watches else None
        packed = packed_of(chosen, chosen.compress(Cached(keys, values, watched), chosen.keeps(25)), 25)
        restored, missing = view.restored(packed), view.missing(packed.tokens)
        for layer in range(4):
            (seen,) = view.seen(layer, torch.zeros(1, 4, 8), packed, 1.0)
            for head in range(2):
                found, own = seen.keys[0, :, head], keys[layer, head]
                places = (found.unsqueeze(1) - own).abs().sum(-1).argmin(-1)
                assert torch.equal(found, own[places]), f"layer {layer} sees what is no token of its own"
                assert torch.equal(seen.values[0, :, head], values[layer, head, places]), "a value is another token's"
                assert (places.diff() > 0).all() and places[-1] == 24, "tokens are in another order, or the newest gone"
                for each, kept in zip(restored, (seen.keys, seen.values), strict=True):
                    assert torch.equal(each[layer, head, missing[layer] :], kept[0, :, head]), "tokens are not restored"


def check_selected(policy: CachePolicy, seeds: int = 4) -> None:
    """Asserts that tokens read the blocks that the rule names by brute force, in float64, computed alone or beside
    others; that they are as many as the budget says; and that a token which a query likes more than all others is what
    it sees, wherever it is."""
    for chosen in (tight(policy), tight(policy, budget=9), tight(policy, block=4, newest=2, budget=16)):
        if (selection := chosen.selection) is None:
            return
        for seed in range(seeds):
            draw = torch_generator(seed, "testing/kv_policy/selected")
            query, keys = (torch.randn(25, heads, 8, generator=draw).double() for heads in (4, 2))
            together = selection.chosen(query, keys, 0)
            for place in range(25):
                alone = selection.chosen(query[place : place + 1], keys[: place + 1], place)[0]
                for head in range(2):
                    found = alone[head].tolist()
                    own = query[place, 2 * head : 2 * head + 2], keys[: place + 1, head]
                    wanted = best_blocks(selection, *own)
                    assert found == wanted, f"token {place} reads the blocks {found}, and the rule says {wanted}"
                    beside = together[place, head, : len(wanted)].tolist()
                    assert beside == wanted, f"computed beside others, token {place} reads the blocks {beside}"
        for place in range(24):
            _check_found(selection, place)


def _check_found(selection: BlockSelection, place: int) -> None:
    """Of 25 tokens, the newest likes the one at ``place`` the most."""
    draw = torch_generator(place, "testing/kv_policy/found")
    keys, values = (torch.randn(25, 2, 8, generator=draw) for _ in range(2))
    query = torch.randn(1, 4, 8, generator=draw)
    keys[place] = 80 * torch.nn.functional.normalize(query[0, ::2], dim=-1)
    found = selection.attend(query, keys, values, 24, 8**-0.5)[0, ::2]
    near = torch.linalg.vector_norm(found - values[place]) < 0.05
    assert near, f"token {place}, which a query likes more than all others, is not what it reads"


def check_copied(policy: CachePolicy) -> None:
    """Asserts that tokens which are packed are the same in copies of their blocks, whatever comes to the blocks
    themselves."""
    chosen, draw = tight(policy).fitted(SHAPE), torch_generator(0, "testing/kv_policy/copied")
    view = chosen.view
    if view is None:
        return
    shape = cache_shape(SHAPE, 2, torch.float32, torch.device("cpu"), blocks=60)
    cache = Reference().open(dataclasses.replace(shape, view=view))
    compactor = Compactor.of(cache, chosen, slots=1, tokens=1)
    sources, targets = torch.arange(25), 26 + torch.arange(chosen.keeps(25))
    assert compactor is not None

    def compressed() -> None:
        cache.write(sources, *(torch.randn(SHAPE.layers, SHAPE.kv_heads, 25, 8, generator=draw) for _ in range(2)))
        compactor.compact([Compaction(0, 25, 0, 0, sources.numpy(), targets.numpy())])

    def found(slots: Tensor) -> tuple[Tensor, Tensor]:
        own = slots[: view.places(chosen.packed(25))]
        return view.restored(Packed.of(*cache.read(own), chosen.packed(25), cache.fetch(own)))

    compressed()
    before, blocks = found(targets), sorted(set((targets // 2).tolist()))
    cache.copy(blocks, [block + 20 for block in blocks])
    compressed()
    for one, other in zip(found(targets + 40), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg="a copy of blocks has not all that they had")


def check_limit(policy: CachePolicy) -> None:
    """Asserts that in the limiting case nothing is ever compressed, or the tokens are those of the full cache all the
    same."""
    limit = tight(policy).limit()
    if limit.fitted(SHAPE).due(10, 0, 0) is None and limit.selection is None:
        return
    config = EngineConfig(kv=limit, attention=Reference(), sequences=3, block_size=2, cache_tokens=400, check=True)
    engine, draw = build_engine(small_model(), config), numpy_generator(0, "testing/kv_policy/limit")
    told: dict[str, list[int]] = defaultdict(list)
    prompts = [[int(token) for token in draw.integers(50, size=66 + 4 * number)] for number in range(3)]
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)))
    while engine.busy:
        for delta in engine.step():
            told[delta.id] += delta.tokens
    assert engine.snapshot().dropped_tokens > 0 or not limit.compresses, "a cache that is to be compressed never was"
    for number, prompt in enumerate(prompts):
        wanted = greedy(small_model(), prompt, 16)
        assert told[str(number)] == wanted, "in the limiting case, tokens are not those of the full cache"


def check_held(policy: CachePolicy) -> None:
    """Asserts that sequences hold no more blocks than the policy says once their prompts are computed, and none that
    are not counted."""
    chosen = tight(policy, budget=12)
    if not chosen.compresses:
        return
    config = EngineConfig(
        kv=chosen, attention=Reference(), tokens=64, sequences=4, block_size=2, cache_tokens=400, check=True
    )
    engine, draw = build_engine(small_model(), config), numpy_generator(0, "testing/kv_policy/held")
    for number in range(4):
        prompt = [int(token) for token in draw.integers(50, size=20 + 3 * number)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=30)))
    fitted = chosen.fitted(SHAPE)
    while engine.busy:
        engine.step()
        done = [each.held for each in engine.memory.running if each.held is not None and each.held.dropped]
        most = [fitted.keeps(held.computed) + 5 for held in done]
        assert all(held.places <= each for held, each in zip(done, most, strict=True)), "a cache grew beyond its budget"
        assert all(len(held.blocks) <= -(-each // 2) for held, each in zip(done, most, strict=True))
    now = engine.snapshot()
    assert now.dropped_tokens > 40 and now.compress_seconds > 0
    assert now.policy == chosen.policy_name and now.held == 0


def check_continued(policy: CachePolicy) -> None:
    """Asserts that a request whose prompt is what another one says is answered as if it came alone; and that the other
    one says the same, though it is preempted once that prompt is in the cache, and computed again."""
    config = EngineConfig(
        kv=tight(policy, budget=8), attention=Reference(), sequences=2, block_size=2, cache_tokens=400, check=True
    )
    prompt = numbers("continued", 20)

    def asked(engine: Engine, id: str, text: list[int], count: int) -> list[int]:
        engine.add(Request(id, text, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)))
        found: list[int] = []
        while id in engine.requests:
            for delta in engine.step():
                said[delta.id] += delta.tokens
                found += delta.tokens if delta.id == id else []
        return found

    said = defaultdict[str, list[int]](list)
    alone = asked(build_engine(small_model(), config), "a", prompt, 24)
    longer = asked(build_engine(small_model(), config), "b", [*prompt, *alone[:13]], 6)
    engine = build_engine(small_model(), config)
    said.clear()
    engine.add(Request("a", prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))
    sequence = engine.requests.of("a")[0]
    while len(said["a"]) < 13:
        for delta in engine.step():
            said[delta.id] += delta.tokens
    found = asked(engine, "b", [*prompt, *alone[:13]], 6)
    assert found == longer, "what was said before is taken for a prompt, and is not the same"
    engine.control.pause()  # what is on its way is told first
    engine.control.resume()
    engine.memory.release(sequence)
    sequence.preempted = True
    engine.steps.batcher.add(sequence)
    while engine.busy:
        for delta in engine.step():
            said[delta.id] += delta.tokens
    assert said["a"] == alone, "a prompt is taken for what was said, and is not the same"


def check_whole(policy: CachePolicy) -> None:
    """Asserts that requests which keep all of their caches, beside others that are compressed and in a pool that is too
    small for all, say what the model does that computes everything anew; so does what goes on from one that was
    compressed. Where tokens read a part of a cache, such requests are refused."""
    for chosen in (tight(policy), tight(policy, when="pressure")):
        config = EngineConfig(
            kv=chosen, attention=Reference(), tokens=64, sequences=5, block_size=2, cache_tokens=130, check=True
        )
        engine, told = build_engine(small_model(), config), defaultdict[str, list[int]](list)
        ways = {kv: SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, kv=kv) for kv in ("full", None)}
        asked = [Request(f"{kv} {place}", numbers(f"{kv} {place}", 20), ways[kv]) for place in range(2) for kv in ways]
        if chosen.selection is not None:
            with contextlib.suppress(UsageError):
                engine.add(asked[0])
                raise AssertionError("a request is taken that would have its own way to read the cache")
            return
        for each in asked:
            engine.add(each)
        while engine.busy:
            said = told[asked[1].id]
            if len(asked) == 4 and len(said) >= 12:
                asked.append(Request("full fork", [*asked[1].prompt, *said], ways["full"]))
                engine.fork(asked[1].id, asked[-1])
            for delta in engine.step():
                told[delta.id] += delta.tokens
        assert (engine.snapshot().dropped_tokens > 0) == chosen.compresses, "those beside them are not compressed"
        assert len(asked) == 5
        for each in asked:
            if each.sampling.kv is not None:
                wanted = greedy(small_model(), each.prompt, 24)
                assert told[each.id] == wanted, f"{each.id!r}, all of whose cache stays, says something else"


def check_engine(policy: CachePolicy, crowds: int, examples: int, steps: int) -> None:
    """Asserts that the tokens of sequences are those of the oracle, whatever happens to them: in so many ``crowds`` in
    which they are preempted again and again, and ``examples`` of any course of events."""

    for chosen in (tight(policy), tight(policy, whole_prompt=False)):
        _play(chosen, crowds, examples, steps)


def _play(policy: CachePolicy, crowds: int, examples: int, steps: int) -> None:
    machine = machine_of(Sarathi())
    machine.kv = policy
    machine.drafts = [(None, Fixed(), ()), (Ngram(shortest=1), Fixed(), ())]
    for seed in range(crowds):
        crowd(machine(), seed)
    if examples:
        run_state_machine_as_test(machine, settings=alike(examples, stateful_step_count=steps))


def check_pressure(policy: CachePolicy, crowds: int, examples: int, steps: int) -> None:
    """Asserts that a policy which waits for pressure gives the tokens of the full cache where nothing presses; that
    under pressure fewer sequences are preempted than with the full cache; and that tokens are those of the oracle,
    compressed where the engine did it, whatever happens: in so many ``crowds`` and ``examples``, as above."""
    if not policy.compresses or "when" not in type(policy).model_fields:
        return
    chosen = tight(policy, when="pressure", budget=9, retained=0.0)
    whole, _ = _served(Full(), 800)
    assert _served(chosen, 800) == (whole, (0, 0)), "a cache is compressed although nothing presses"
    _, (preempted, _) = _served(Full(), 200)
    _, (fewer, dropped) = _served(chosen, 200)
    assert dropped > 0, "nothing is compressed although blocks are missing"
    assert fewer < preempted, f"{fewer} sequences are preempted, and {preempted} with the full cache"
    check_thrown_out(tight(policy, when="pressure"))
    _play(tight(policy, when="pressure"), crowds, 0, 0)
    _play(tight(policy, when="pressure", whole_prompt=False), crowds, examples, steps)


def check_thrown_out(policy: CachePolicy) -> None:
    """Asserts the same of a sequence that is preempted, and computed again in small pieces while another one grows and
    presses; and of its fork, once it was compressed, which is preempted too."""
    config = EngineConfig(
        kv=policy, attention=Reference(), loop=Plain(), tokens=3, sequences=3, block_size=2, cache_tokens=60, check=True
    )
    engine, told = build_engine(small_model(), config), defaultdict[str, list[int]](list)
    texts = {id: numbers(f"thrown out {id}", 6) for id in "ab"}

    def step() -> None:
        for delta in engine.step():
            told[delta.id] += delta.tokens

    def throw_out(sequence: Sequence) -> None:
        engine.memory.release(sequence)
        engine.memory.pool.forget()  # or it would find all of it again
        sequence.preempted = True
        engine.steps.batcher.add(sequence)

    for id, prompt in texts.items():
        engine.add(Request(id, prompt, SamplingParams(temperature=0, max_tokens=44)))
    sequences = {id: engine.requests.of(id)[0] for id in "ab"}
    while len(told["b"]) < 18:
        step()
    throw_out(sequences["b"])
    while engine.busy:
        if "c" not in sequences and sequences["b"].running and sequences["b"].compressed and len(told["b"]) > 22:
            texts["c"] = [*texts["b"], *told["b"]]
            engine.fork("b", Request("c", texts["c"], SamplingParams(temperature=0, max_tokens=8)))
            sequences["c"] = engine.requests.of("c")[0]
        if len(told["c"]) == 3 and not sequences["c"].preempted:
            throw_out(sequences["c"])
        step()
    assert engine.snapshot().held == 0
    for id, sequence in sequences.items():
        places = (tuple(sequence.compressed),)
        asked = (small_model(), tuple(texts[id]), sequence.prompt, SamplingParams(temperature=0), 0)
        assert told[id] == expected(*asked, len(told[id]), told[id], policy, places), (
            f"{id!r}, compressed at {places[0]}, says something else"
        )


def _served(policy: CachePolicy, tokens: int) -> tuple[dict[str, list[int]], tuple[int, int]]:
    """What is said to six requests, of which four fit into a pool of so many ``tokens`` whole; how many were preempted,
    and how many tokens dropped."""
    config = EngineConfig(
        kv=policy, attention=Reference(), tokens=64, sequences=6, block_size=4, cache_tokens=tokens, check=True
    )
    engine, told = build_engine(small_model(), config), defaultdict[str, list[int]](list)
    for number in range(6):
        prompt = numbers(f"pressed {number}", 20)
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=30)))
    while engine.busy:
        for delta in engine.step():
            told[delta.id] += delta.tokens
        assert engine.memory.pool.held <= engine.limits.blocks
    now = engine.snapshot()
    assert now.held == 0
    return dict(told), (now.preemptions, now.dropped_tokens)
