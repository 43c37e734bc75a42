"""A roster of experts [173]: copies of a token with noise in the routers, over the cache of the pass without it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from penstock.core.errors import UsageError
from penstock.core.randomness import derive
from penstock.models.attention import CachedRows
from penstock.ops.attention import attend_rows
from penstock.ops.paged.contract import PagedBatch
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.contract import Copies
from penstock.serve.decode.roster import Roster
from penstock.serve.messages import Request
from penstock.serve.run.copies import Copied, shaken
from penstock.serve.run.record import read_header
from penstock.serve.run.replay import replay
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.decode_rule import decode, tiny_engine
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_model import MIXTURE, SHAPE, small_mixture, small_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]
COUNTS = [4, 1, 3]


def copies_of(rows, keys, noise=0.5) -> Copied:
    """One copy of each row, with a key of its own."""
    numbers = np.zeros(len(rows), np.int64)
    return Copied(np.array(rows), numbers, np.array(keys, np.uint64), np.full(len(rows), noise))


class Beside(CachedRows):
    """A token that is computed again: it looks at what was kept of it and those before it, and keeps nothing."""

    def __init__(self, clean: CachedRows) -> None:
        self._clean = clean

    @property
    def positions(self):
        return self._clean.positions[:, -1:]

    def attend(self, layer, query, key, value, *, scale, window, extras):
        return attend_rows(query, *self._clean.kept(layer), scale=scale, extras=extras)


def distributions(tokens: list[int], seed: int, copies: int, noise: float) -> list[torch.Tensor]:
    """What the model says after ``tokens``, and what each copy says, computed alone."""
    model, clean, position = small_mixture(), CachedRows(), len(tokens) - 1
    with torch.inference_mode():
        found = [model.logits(model(torch.tensor([tokens]), clean.extend(len(tokens))).hidden[0, -1])]
        for number in range(copies - 1):
            copied = copies_of([position], [derive(seed, "experts", number)], noise)
            with shaken(model, torch.from_numpy(copied.noise(MIXTURE, np.array([position])))):
                hidden = model(torch.tensor([tokens[-1:]]), Beside(clean)).hidden
            found.append(model.logits(hidden[0, 0]))
    return [each.softmax(-1) for each in found]


@pytest.mark.parametrize("options", [{"loop": "plain"}, {"loop": "overlapped", "tokens": 9}])
def test_scores_are_the_mean_of_copies_computed_alone(options):
    """Prompts in pieces, several copies of several sequences in a batch, and one that has none."""
    given = {
        "attention": "reference",
        "tokens": 40,
        "sequences": 4,
        "block_size": 4,
        "cache_tokens": 400,
        "check": True,
    }
    engine = build_engine(small_mixture(), EngineConfig.model_validate(given | options))
    for seed, (prompt, copies) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        rule = Roster(copies=copies, noise=1.5)
        length = 6 if copies > 1 else 9  # and goes on alone
        sampling = SamplingParams(max_tokens=length, seed=seed, temperature=0.9, logprobs=20, rule=rule)
        engine.add(Request(str(seed), prompt, sampling))
    texts, moved = [list(each) for each in PROMPTS], 0.0
    while engine.busy:
        for delta in engine.step():
            seed = int(delta.id)
            for token, row in zip(delta.tokens, delta.logprobs or (), strict=True):
                found = distributions(texts[seed], seed, COUNTS[seed], 1.5)
                mean = torch.stack(found).mean(0).log()
                for other, logprob in row.top:
                    assert logprob == pytest.approx(float(mean[other]), abs=1e-4)
                moved = max(moved, float((mean - found[0].log()).abs().max()))
                texts[seed].append(token)
    assert [len(text) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)] == [6, 9, 6]
    assert moved > 0.01, "the noise changes nothing"
    assert engine.snapshot().held == 0


def test_without_noise_copies_say_what_the_model_says():
    assert Roster(noise=0.0).again is None and Roster(copies=1).again is None
    assert Roster(copies=3, noise=0.5).again == Copies(2, 0.5)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    same = copies_of([1, 1, 3], [1, 2, 3])
    same.numbers[1] = 1
    found = same.averaged(torch.cat([logits, logits[[1, 1, 3]]]), np.array([0, 1, 2, 3]))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    torch.testing.assert_close(found[[1, 3]], logits[[1, 3]].log_softmax(-1))


def test_the_noise_is_gumbels_and_each_number_its_own():
    noise = copies_of([0] * 400, range(400), 2.0).noise(MIXTURE, np.arange(400))
    assert noise.shape == (MIXTURE.layers, 400, 6) and len(np.unique(noise)) == noise.size
    assert noise.mean() == pytest.approx(2 * 0.5772, abs=0.15)
    assert noise.var() == pytest.approx(4 * math.pi**2 / 6, rel=0.15)
    flat = noise.swapaxes(0, 1).reshape(400, -1)
    apart = np.corrcoef(flat, rowvar=False) - np.eye(flat.shape[1])
    assert np.abs(apart).max() < 0.25  # five deviations of 1 / 20


def test_the_variance_of_the_mean_falls_as_one_over_the_copies():
    """Of n copies n - 1 are noisy: (n - 1) / n^2 of the variance of one of them."""
    model, count, tokens = small_mixture(), 4096, PROMPTS[0]
    clean, copied = CachedRows(), copies_of([0] * count, [derive(0, "experts", number) for number in range(count)])
    with torch.inference_mode():
        own = model.logits(model(torch.tensor([tokens]), clean.extend(len(tokens))).hidden[0, -1]).softmax(-1)
        noise = torch.from_numpy(copied.noise(MIXTURE, np.full(count, len(tokens) - 1)))
        for layer in range(MIXTURE.layers):  # as many rows as copies
            clean._cache[layer] = tuple(each.expand(count, -1, -1, -1) for each in clean.kept(layer))
        with shaken(model, noise):
            noisy = model.logits(model(torch.tensor([tokens[-1:]] * count), Beside(clean)).hidden[:, 0]).softmax(-1)
    single = noisy.double().var(0).sum()
    for copies in (3, 5, 9, 17):
        groups = noisy[: count // (copies - 1) * (copies - 1)].double().unflatten(0, (-1, copies - 1))
        variance = ((own + groups.sum(1)) / copies).var(0).sum()
        assert float(variance / single) == pytest.approx((copies - 1) / copies**2, rel=0.15)


def test_copies_stand_behind_the_batch_they_belong_to():
    """As sequences of one token: whose table, up to which token, and where nobody reads."""
    plan = PagedBatch(
        starts=torch.tensor([0, 3, 4], dtype=torch.int32),
        lengths=torch.tensor([9, 5], dtype=torch.int32),
        tables=torch.tensor([[4, 7, 2], [1, 3, 0]], dtype=torch.int32),
        slots=torch.tensor([30, 31, 8, 12]),
    )
    inputs = np.array([[10, 11, 12, 13], [0, 0, 0, 1], [6, 7, 8, 4]])
    more, wide = copies_of([2, 2, 3], [1, 2, 3]).beside(inputs, plan, block=9, size=4)
    assert more[:, 4:].tolist() == [[12, 12, 13], [0, 0, 1], [8, 8, 4]]
    assert wide.starts.tolist() == [0, 3, 4, 5, 6, 7] and wide.lengths.tolist() == [9, 5, 9, 9, 5]
    assert wide.tables[2:].tolist() == [[4, 7, 2], [4, 7, 2], [1, 3, 0]]
    assert wide.slots.tolist() == [30, 31, 8, 12, 36, 37, 38]


def ruled(copies: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=12, rule=Roster(copies=copies, noise=1.0), **more)


def test_short_memory_small_steps_and_drafts_change_nothing():
    samplings = [ruled(4, seed=seed) for seed in range(3)]
    expected = decode(tiny_engine(small_mixture()), PROMPTS, samplings)
    given = {"attention": "reference", "block_size": 4, "sequences": 3, "check": True}
    for options in ({"cache_tokens": 44, "tokens": 12}, {"cache_tokens": 400, "tokens": 5, "draft": Ngram(shortest=1)}):
        engine = build_engine(small_mixture(), EngineConfig.model_validate(given | options))
        assert decode(engine, PROMPTS, samplings) == expected
        assert engine.steps.speculation is None or not sum(engine.steps.speculation.drafted)


def test_no_step_computes_more_than_it_may():
    engine = build_engine(
        small_mixture(), EngineConfig(attention="reference", tokens=10, sequences=4, cache_tokens=400)
    )
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, ruled(4)))
    seen = []
    while engine.busy:
        engine.step()
        seen.append(engine.snapshot().batch_tokens)
    assert max(seen) <= 10 and 8 in seen  # two sequences with four copies each


@pytest.mark.parametrize("batching", enrolled("serve.batching"))
def test_every_batching_policy_makes_room_for_copies(batching):
    """As many as a step can have, beside prompts that fill it."""
    given = {"attention": "reference", "tokens": 8, "sequences": 4, "block_size": 4, "cache_tokens": 400}
    engine = build_engine(small_mixture(), EngineConfig.model_validate(given | {"batching": batching}))
    found = decode(engine, PROMPTS, [ruled(8), SamplingParams(max_tokens=3), ruled(5)])
    assert [len(each) for each in found] == [12, 3, 12]


def test_recorded_copies_are_computed_again(tmp_path):
    path = tmp_path / "steps.bin"
    sizes = {"attention": "reference", "tokens": 40, "sequences": 8, "block_size": 4, "cache_tokens": 400}
    config = EngineConfig.model_validate({**sizes, "record": str(path)})
    engine = build_engine(small_mixture(), config, source="small")
    decode(engine, PROMPTS, [ruled(3), ruled(1), ruled(2)])
    engine.close()
    read = EngineConfig.model_validate(read_header(path)["engine"])
    found = replay(path, build_runner(small_mixture(), read))
    assert found.chosen == found.equal >= 36


@pytest.mark.parametrize(
    ("model", "copies", "words"), [(small_model, 4, "has no experts"), (small_mixture, 41, "too few for 41 copies")]
)
def test_what_cannot_be_copied_is_refused(model, copies, words):
    with pytest.raises(UsageError, match=words):
        tiny_engine(model()).add(Request("a", [1], ruled(copies)))
    assert SHAPE.moe is None
