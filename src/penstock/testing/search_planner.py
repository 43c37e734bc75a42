"""The law of ``search.planner``.

What each clause is there to catch:

- :func:`check_counts`: operations or bytes that are left out, counted twice, or those of another token;
- :func:`check_ledger`: a prompt that is computed for each text, or for none; texts that are not cut off where the
  choice says, or cost what they would have cost uncut;
- :func:`check_sparse`: sparse attention that costs other than what an engine computes and the rule reads, in the
  prompt too; one that covers all and costs more than dense attention;
- :func:`check_costs`: a cost that falls with the length; sparse attention that costs more than dense attention;
- :func:`check_choice`: a choice above the budget; right texts that are too long for the choice and count all the same;
  a model, an attention, a length or a number that is passed over; the dearer of two that are right as often.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.models.attention import CachedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.paged.selection import BlockSelection
from penstock.plan.hardware import DEVICES, Hardware
from penstock.search.coverage import coverage
from penstock.search.driver import Driver, run
from penstock.search.ledger import Budget
from penstock.search.planners.contract import Candidate, Choice, Drawn, Planner
from penstock.search.play import Play
from penstock.search.prices import Prices, Unit
from penstock.search.programs.coverage import Coverage
from penstock.search.search import Search
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.policies.block_topk import BlockTopK
from penstock.serve.messages import Request
from penstock.testing.engine.requests import numbers
from penstock.testing.refusals import refused
from penstock.testing.search_program import ENDS, scored, small_engine
from penstock.testing.search_table import Letters
from penstock.testing.serve_model import SHAPE

SMALL = DecoderConfig(vocabulary=50, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64)
LARGE = DecoderConfig(vocabulary=50, hidden=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=64, context=64)

#: Reads a byte in the time of 40 operations, so that neither is next to nothing for models of these sizes.
DEVICE = Hardware(flops=4e3, bandwidth=1e2, memory=1e9)

#: Reads three blocks of four tokens at most.
SPARSE = BlockSelection(4, 12, 1, 1)

UNITS: tuple[Unit, ...] = get_args(Unit)


def check(planner: Planner) -> None:
    """Asserts the law."""
    check_counts(planner.limit())
    check_ledger(planner.limit(), None)
    check_ledger(planner.limit(), SPARSE)
    check_sparse(planner.limit())
    check_costs(planner)
    for seed in range(2):
        check_choice(planner, seed)


def counted(config: DecoderConfig, length: int, width: int = 2) -> Iterator[tuple[int, int]]:
    """Of each of the first ``length`` positions: the operations that PyTorch counts while a real decoder computes it,
    and the bytes of the keys and values that its attention is given."""
    model, context = Decoder(config).initialize(0), CachedRows()
    for position in range(length):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.inference_mode():
            hidden = model(torch.tensor([[position % config.vocabulary]]), context.extend(1)).hidden
            model.logits(hidden)
        kept = [context.kept(layer) for layer in range(config.layers)]
        # Values of latent attention are the first numbers of the keys.
        read = sum(key.numel() + (value.numel() if config.latent is None else 0) for key, value in kept)
        yield counter.get_total_flops(), width * read


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    found: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return found


#: The attention of the CPU, which the counter does not know by itself.
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def check_counts(limit: Planner) -> None:
    """Asserts that positions cost what a real decoder computes and reads for them."""
    prices = limit.prices(LARGE, DEVICE)
    for position, (flops, read) in enumerate(counted(LARGE, 12)):
        found = prices.cost("flops", position, position + 1)
        assert found == flops, f"position {position} costs {found} operations, and a decoder makes {flops}"
        both = prices.cost("eflops", position, position + 1)
        assert np.isclose(both, flops + 40 * read), f"position {position} costs {both} eFLOPs: {read} bytes are read"


def check_sparse(limit: Planner) -> None:
    """Asserts that the tokens of an engine with sparse attention cost what PyTorch counts while they are computed, and
    what the rule reads, by a count of tokens and of whole blocks to choose from; dense in the prompt."""
    config = LARGE.model_copy(update={"vocabulary": SHAPE.vocabulary})
    prices, engine = limit.prices(config, DEVICE, 2, SPARSE), _sparse_engine(config)
    engine.add(Request("a", numbers("sparse", 6), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))
    engine.step()  # the prompt
    for position in range(6, 29):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            engine.step()
        found, counts = prices.cost("flops", position, position + 1, 6), counter.get_total_flops()
        assert found == counts, f"position {position} costs {found} operations, and an engine makes {counts}"
        blocks = position // 4 + 1
        read = 2 * (position + 1 if blocks <= 3 else 8 + position % 4 + 1) + (blocks - 2 if blocks > 3 else 0)
        more = prices.cost("eflops", position, position + 1, 6) - found
        assert np.isclose(more, 40 * 2 * 3 * 2 * 8 * read), f"position {position} reads {more / 40} bytes"
    dense = limit.prices(config, DEVICE)
    for unit in UNITS:
        assert prices.cost(unit, 0, 20, 20) == dense.cost(unit, 0, 20), "a prompt is not computed densely"
        wide = limit.prices(config, DEVICE, 2, BlockSelection(4, 1.0, 1, 1))
        assert wide.cost(unit, 0, 40, 9) == dense.cost(unit, 0, 40), "what covers all costs other than all"


def _sparse_engine(config: DecoderConfig) -> Engine:
    kv = BlockTopK(**dataclasses.asdict(SPARSE))
    engine = {"loop": "plain", "attention": "reference", "block_size": 4, "cache_tokens": 400, "kv": kv}
    return build_engine(Decoder(config).initialize(0).eval(), EngineConfig.model_validate(engine), ENDS)


def check_ledger(limit: Planner, sparse: BlockSelection | None) -> None:
    """Asserts that choices cost what searches spend that draw them: the whole run, and one cut short."""
    whole = [_drawn(seed, 4, 12, sparse) for seed in range(3)]
    drawn = tuple(
        Drawn(
            len(play.search.root.tokens),
            *zip(*((len(each.generated), True) for each in play.search.leaves), strict=True),
        )
        for play in whole
    )
    short = [_drawn(seed, 4, 5, sparse) for seed in range(3)]
    for unit, (length, plays) in itertools.product(UNITS, ((12, whole), (5, short))):
        spent = [getattr(play.search.ledger, unit) for play in plays]
        prices = limit.prices(SHAPE, DEVICES["h100"], 2, sparse)
        found = _brute_cost(drawn, length, 4, unit, prices)
        assert np.isclose(found, np.mean(spent)), f"{found} {unit} are planned, and {np.mean(spent)} are spent"
        offered = limit.frontier([Candidate("", SHAPE, drawn, sparse)], unit, DEVICES["h100"])
        for choice in offered:
            wanted = _brute_cost(drawn, choice.length, choice.samples, unit, prices)
            assert np.isclose(choice.cost, wanted), f"{choice} costs {wanted}"


def _drawn(seed: int, n: int, most: int, sparse: BlockSelection | None) -> Play:
    """A search that draws ``n`` texts of up to ``most`` tokens."""
    search = Search({}, numbers(f"drawn {seed}", 5 + seed), Letters(), seed=seed, budget=Budget(), most=most, ends=ENDS,
                    context=SHAPE.context)  # fmt: skip
    options = {} if sparse is None else {"kv": BlockTopK(**dataclasses.asdict(sparse))}
    driver = Driver(small_engine(**options), SamplingParams(max_tokens=most), {"": scored})
    search._released = driver.released
    play = Play(search, Coverage(n=n).run(search), Prices(SHAPE, selection=sparse))
    list(run(driver, iter([play]), lambda: False))
    driver.abandon()
    return play


def check_costs(planner: Planner) -> None:
    """Asserts that a position of a prompt costs no less than the one before, and one that reads a part of it no more
    than one that reads all."""
    for shape, unit in itertools.product((SMALL, LARGE), UNITS):
        prices = planner.prices(shape, DEVICE, 2, SPARSE)
        each = [prices.cost(unit, position, position + 1) for position in range(shape.context)]
        assert all(b >= a for a, b in itertools.pairwise(each)), f"{unit} of a position fall: {each}"
        less = [prices.cost(unit, position, position + 1, 0) for position in range(shape.context)]
        assert all(a <= b for a, b in zip(less, each, strict=True)), f"{unit} of sparse attention: {less}"


def check_choice(planner: Planner, seed: int) -> None:
    """Asserts that choices are those that trying everything finds, for budgets of any size."""
    draw = numpy_generator(seed, "testing/search.planner")
    kinds = (("small", SMALL, None), ("large", LARGE, None), ("large", LARGE, SPARSE))
    candidates = [_candidate(draw, name, shape, sparse, 3) for name, shape, sparse in kinds]
    for unit in UNITS:
        every = list(_every(planner, candidates, unit))
        costs = sorted(each.cost for each in every if each.accuracy > 0)
        with refused(UsageError, "pay for no choice"):
            planner.choose(candidates, costs[0] * 0.99, unit, DEVICE)
        for budget in [costs[0] * 1.0001, *(float(draw.uniform(costs[0], costs[-1])) for _ in range(4)), 1e30]:
            found = planner.choose(candidates, budget, unit, DEVICE)
            assert found.cost <= budget, f"{found} costs more than {budget}"
            paid = [each for each in every if each.cost <= budget]
            best = max(each.accuracy for each in paid)
            assert np.isclose(found.accuracy, best), f"{found} is right less often than {best} for {budget} {unit}"
            least = min(each.cost for each in paid if each.accuracy > best - 1e-9)
            assert np.isclose(found.cost, least), f"{found} costs more than {least}, which is right as often"


def _candidate(
    draw: np.random.Generator, name: str, shape: DecoderConfig, sparse: BlockSelection | None, problems: int
) -> Candidate:
    def drawn() -> Drawn:
        lengths = tuple(draw.integers(1, 9, 4).tolist())
        return Drawn(int(draw.integers(1, 30)), lengths, tuple((draw.random(4) < 0.4).tolist()))

    return Candidate(name, shape, tuple(drawn() for _ in range(problems)), sparse)


def _every(planner: Planner, candidates: Sequence[Candidate], unit: Unit) -> Iterator[Choice]:
    """Every model, length and number."""
    for candidate in candidates:
        prices = planner.prices(candidate.model, DEVICE, 2, candidate.sparse)
        for length, k in itertools.product(range(1, 10), range(1, candidate.samples + 1)):
            counts = [
                (len(each.lengths), sum(right and own <= length for own, right in zip(each.lengths, each.right,
                                                                                      strict=True)))
                for each in candidate.drawn
            ]  # fmt: skip
            cost = _brute_cost(candidate.drawn, length, k, unit, prices)
            yield Choice(candidate.name, length, k, coverage(counts, k), cost, candidate.sparse)


def _brute_cost(drawn: Sequence[Drawn], length: int, k: int, unit: Unit, prices: Prices) -> float:
    """Of ``k`` texts cut off after ``length`` tokens, on average: the prompt but for its last token once, and of each
    text all tokens but the last, behind that one. A text of n tokens takes n of generated ones."""
    costs = []
    for each in drawn:
        counts = [min(own, length) for own in each.lengths]
        behind = each.prompt - 1
        if unit == "generated":
            costs.append(k * np.mean(counts))
        else:
            texts = [prices.cost(unit, behind, behind + count, each.prompt) for count in counts]
            costs.append(prices.cost(unit, 0, behind) + k * np.mean(texts))
    return float(np.mean(costs))
