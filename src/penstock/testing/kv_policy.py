"""The law of ``kv.policy``: caches that are compressed inside of the engine, beside one that is kept by hand.

What each clause is there to catch:

- :func:`check_sizes`: a policy that is due at a place which it has passed, that keeps more than it says, or that goes
  on although its budget covers all;
- :func:`check_rows`: layers and heads that are computed together and touch each other, tokens that change their order,
  results of another size or dtype, a request for fewer tokens that does not give fewer;
- :func:`check_shared`: a layer that is given another one's norms, and directions that come from nowhere;
- :func:`check_engine`: a sequence whose tokens depend on the batch, on chunks of its prompt, on blocks that it shares,
  on a fork, or on having been thrown out; blocks that are lost, or not given back; a place that is taken for a
  position; queries that are another sequence's, or too old; what is remembered of one token and told of another;
- :func:`check_held`: a cache that grows beyond what the policy says.

The oracle (:class:`~penstock.testing.kept_scores.KeptScores`) has the keys and values of one sequence, a list for each
layer, and computes attention by its definition, in float64; of the policy it asks when it is due and what it makes of a
cache. Each policy's own rule is tested by brute force beside this.
"""

from __future__ import annotations

import torch
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from penstock.core.randomness import numpy_generator, torch_generator
from penstock.ops.paged.reference import Reference
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.kv.policies.contract import Cached, CachePolicy, Kept
from penstock.serve.messages import Request
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.alike import alike
from penstock.testing.serve_batching import crowd, machine_of
from penstock.testing.serve_model import SHAPE, small_model


def check(policy: CachePolicy, crowds: int = 3, examples: int = 6, steps: int = 20) -> None:
    """Asserts the law, for the ``policy`` with small budgets."""
    check_sizes(policy)
    check_rows(policy)
    check_shared(policy)
    check_held(policy)
    check_engine(policy, crowds, examples, steps)


def tight(policy: CachePolicy, **more: object) -> CachePolicy:
    """``policy`` with a budget that small texts exceed, where it has one."""
    known = type(policy).model_fields
    small = {"budget": 0.4, "every": 5, "history": 4, "window": 4, "recent": 2, "sinks": 2, "pool": 3}
    small |= {"start": 0.0, "retained": 0.2}
    own = {name: value for name, value in {**small, **more}.items() if name in known}
    if isinstance(known.get("recent") and known["recent"].default, float):
        own.pop("recent")
    return type(policy).model_validate({**policy.model_dump(), **own})


def check_sizes(policy: CachePolicy) -> None:
    """Asserts that compressions follow each other, each leaves as much as it says, and none comes where all is kept."""
    policies = (policy, tight(policy), tight(policy, whole_prompt=False), tight(policy, budget=9))
    for each in [each.fitted(8, 64) for each in policies]:
        for prompt in (1, 7, 40):
            computed = dropped = 0
            first = each.due(prompt, 0, 0)
            assert first is None or first >= prompt or not getattr(each, "whole_prompt", True), "a prompt is cut"
            while (due := each.due(prompt, computed, dropped)) is not None and due < 200:
                left = each.keeps(due)
                assert computed < due, "a compression is due that is past"
                assert 0 < left < due - dropped, f"of {due - dropped} tokens {left} are kept"
                computed, dropped = due, due - left
    for option in {"budget", "retained"} & type(policy).model_fields.keys():
        assert tight(policy, **{option: 1}).due(10, 0, 0) is None, "a budget that covers all throws something out"


def check_rows(policy: CachePolicy, seeds: int = 6) -> None:
    """Asserts that each head is compressed as if it were alone, and each layer where they share nothing, to as many
    places, in the cache's dtype."""
    chosen = tight(policy).fitted(4, 8)
    if not chosen.compresses:
        return
    paired = chosen.paired is not None
    count, layers = (chosen.keeps(25), [slice(None)]) if paired else (11, list(range(4)))
    assert not (paired and (chosen.watches or chosen.remembers))
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
            for head in (slice(0, 1), slice(1, 2)):
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
    chosen = tight(policy).fitted(4, 8)
    paired = chosen.paired
    if paired is None:
        return
    draw = torch_generator(0, "testing/kv_policy/shared")
    keys, values = (torch.randn(4, 2, 25, 8, generator=draw) for _ in range(2))

    def found(vectors: Tensor) -> Tensor:
        return paired.restored(chosen.compress(Cached(vectors, values), chosen.keeps(25)).keys, 25)

    norms, kept = (torch.linalg.vector_norm(each, dim=-1).sort(-1).values for each in (keys, found(keys)))
    torch.testing.assert_close(kept, norms, msg="a vector has another norm than it had")
    alike = keys[:1] * torch.arange(1, 5).view(4, 1, 1, 1)
    torch.testing.assert_close(found(alike).sort(2).values, alike.sort(2).values, msg="equal directions are not kept")


def _same(alone: Kept, whole: Kept, layer: int | slice, head: slice) -> None:
    pairs = [(alone.keys, whole.keys), (alone.values, whole.values)]
    if alone.drawn is not None and whole.drawn is not None:
        pairs.append((alone.drawn, whole.drawn))
    for one, other in pairs:
        torch.testing.assert_close(one, other[layer, head])


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
    fitted = chosen.fitted(SHAPE.layers, SHAPE.head_dim)
    while engine.busy:
        engine.step()
        done = [each.held for each in engine.memory.running if each.held is not None and each.held.dropped]
        most = [fitted.keeps(held.computed) + 5 for held in done]
        assert all(held.places <= each for held, each in zip(done, most, strict=True)), "a cache grew beyond its budget"
        assert all(len(held.blocks) <= -(-each // 2) for held, each in zip(done, most, strict=True))
    assert engine.snapshot().dropped_tokens > 40
    assert engine.snapshot().held == 0


def check_engine(policy: CachePolicy, crowds: int, examples: int, steps: int) -> None:
    """Asserts that the tokens of sequences are those of the oracle, whatever happens to them: in so many ``crowds`` in
    which they are thrown out again and again, and ``examples`` of any course of events."""

    for chosen in (tight(policy), tight(policy, whole_prompt=False)):
        machine = machine_of(Sarathi())
        machine.kv = chosen
        machine.drafts = [(None, Fixed(), ()), (Ngram(shortest=1), Fixed(), ())]
        for seed in range(crowds):
            crowd(machine(), seed)
        run_state_machine_as_test(machine, settings=alike(examples, stateful_step_count=steps))
