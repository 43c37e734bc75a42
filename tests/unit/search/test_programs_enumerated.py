"""Programs on models that are tables: all that can happen is enumerated, and set against closed forms."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict

import pytest

from penstock.core.randomness import numpy_generator
from penstock.search.programs.a_star import AStar
from penstock.search.programs.best_of_n import BestOfN
from penstock.search.programs.ets import EfficientTreeSearch, select, worth
from penstock.search.programs.first_finish import FirstFinish
from penstock.search.programs.majority import Majority
from penstock.search.programs.particle import Particle
from penstock.search.programs.particle_gibbs import ParticleGibbs
from penstock.search.programs.particle_tempering import ParticleTempering
from penstock.search.programs.reward_voting import RewardVoting
from penstock.search.programs.until_accepted import UntilAccepted
from penstock.search.programs.value_exact import ValueExact
from penstock.search.programs.value_guided import ValueGuided
from penstock.search.shared.allotting import rebase
from penstock.search.shared.resampling import systematic
from penstock.testing.search_table import outcomes, texts


def chain(text: str) -> dict[str, float]:
    """Two letters, then the end; every letter is a step."""
    if len(text) >= 2:
        return {"$": 1.0}
    return {"a": 0.6, "b": 0.4} if not text.endswith("b") else {"a": 0.3, "b": 0.5, "$": 0.2}


@functools.cache
def value(text: str, finished: bool = True) -> float:
    return {"a": 0.3, "b": 0.1, "aa": 0.2, "ab": 0.9, "ba": 0.6, "bb": 0.05}.get(text, 0.0)


def answers(program, table=chain, scored=value, **options) -> dict[str, float]:
    """The distribution of the answer's text."""
    found: dict[str, float] = defaultdict(float)
    for outcome in outcomes(program.run, table, scored, step="", **options):
        found[outcome.text] += outcome.probability
    assert math.isclose(sum(found.values()), 1.0)
    return found


def tilted(heat: float) -> tuple[dict[str, float], float]:
    """p(x) exp(value(x) / heat) / Z, and Z."""
    weights = {text: chance * math.exp(value(text) / heat) for text, chance in texts(chain).items()}
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}, sum(weights.values())


def away(found: dict[str, float], wanted: dict[str, float]) -> float:
    return sum(abs(found.get(text, 0.0) - wanted.get(text, 0.0)) for text in {*found, *wanted}) / 2


@pytest.mark.parametrize("resample", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("particles", [1, 2])
def test_the_evidence_of_particles_is_unbiased(particles, resample):
    _, z = tilted(0.5)
    program = Particle(particles=particles, temperature=0.5, resample=resample)
    mean = sum(
        each.probability * math.exp(each.play.search.notes["log_evidence"])
        for each in outcomes(program.run, chain, value, step="")
    )
    assert mean == pytest.approx(z, rel=1e-12)


def test_particles_approach_the_posterior():
    wanted, _ = tilted(0.3)
    distances = [
        away(answers(Particle(particles=n, temperature=0.3, greedy=False, resample=1.0)), wanted) for n in (1, 2, 3)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(away(texts(chain), wanted)), "one particle is the model"
    assert distances[2] < 0.6 * distances[0]


def test_sweeps_of_gibbs_approach_the_posterior_with_few_particles():
    """Of one step: a sweep of two is the filter; each further one takes the distance down by a share that is known from
    the chain itself, whose kernel keeps the posterior as it is."""
    own = {"a": 0.7, "b": 0.3}
    weights = {text: chance * math.exp(value(text) / 0.2) for text, chance in own.items()}
    wanted = {text: weight / sum(weights.values()) for text, weight in weights.items()}

    def swept(n: int) -> dict[str, float]:
        program = ParticleGibbs(particles=2, sweeps=n, temperature=0.2, greedy=False)
        return answers(program, lambda text: {"$": 1.0} if text else own, most=1)

    distances = [away(swept(n), wanted) for n in (1, 2, 3)]
    assert 0 < distances[1] < 0.8 * distances[0]
    assert distances[2] / distances[1] == pytest.approx(distances[1] / distances[0])


def test_one_temperature_is_the_plain_filter():
    cold = answers(ParticleTempering(particles=2, temperatures=(0.3,)))
    assert away(cold, answers(Particle(particles=2, temperature=0.3, greedy=False))) < 1e-12


def test_tempering_exchanges_by_metropolis():
    """One particle each: the model's own texts x (cold) and y (hot) change places with the chance of the rule."""
    found, own = answers(ParticleTempering(particles=1, temperatures=(0.2, 0.6))), texts(chain)
    wanted: dict[str, float] = defaultdict(float)
    for one, first in own.items():
        for other, second in own.items():
            chance = math.exp(min(0.0, (1 / 0.2 - 1 / 0.6) * (value(other) - value(one))))
            wanted[other] += first * second * chance
            wanted[one] += first * second * (1 - chance)
    assert away(found, wanted) < 1e-12


def test_systematic_resampling_is_fair_and_even():
    for seed in range(20):
        draw = numpy_generator(seed, "systematic")
        weights = draw.dirichlet([0.5] * int(draw.integers(1, 6))).tolist()
        n = int(draw.integers(1, 7))
        mean = [0.0] * len(weights)
        shares: list[float] = []
        place = 0

        def choose(options):
            shares[:] = options  # noqa: B023
            return place  # noqa: B023

        while place == 0 or place < len(shares):
            counts = systematic(weights, n, choose)
            assert sum(counts) == n
            assert all(abs(count - n * weight) < 1 for count, weight in zip(counts, weights, strict=True))
            mean = [total + shares[place] * count for total, count in zip(mean, counts, strict=True)]
            place += 1
        assert mean == pytest.approx([n * weight for weight in weights])


def test_accepted_texts_are_exact_samples():
    wanted, _ = tilted(0.4)
    found: dict[str, float] = defaultdict(float)
    for each in outcomes(ValueExact(alpha=0.4, tries=2, together=2).run, chain, value, step=""):
        if each.play.search.notes["accepted"]:
            found[each.text] += each.probability
    whole = sum(found.values())
    assert away({text: chance / whole for text, chance in found.items()}, wanted) < 1e-12
    accept = sum(chance * math.exp((value(text) - 1) / 0.4) for text, chance in texts(chain).items())
    assert whole == pytest.approx(1 - (1 - accept) ** 2)


def test_value_guidance_approaches_the_tilted_step():
    """Of one step: p(x) exp(value(x) / alpha) / Z."""
    once = lambda text: {"$": 1.0} if text else {"a": 0.7, "b": 0.3}  # noqa: E731
    scored = lambda text, finished: {"a": 0.0, "b": 0.5}.get(text, 0.0)  # noqa: E731
    weights = {"a": 0.7, "b": 0.3 * math.exp(0.5 / 0.4)}
    wanted = {text: weight / sum(weights.values()) for text, weight in weights.items()}
    distances = [away(answers(ValueGuided(candidates=n, alpha=0.4), once, scored, most=1), wanted) for n in (1, 2, 4)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.5 * distances[0]


def test_best_of_n_is_the_largest_of_n():
    own = sorted(texts(chain).items(), key=lambda item: value(item[0]))
    found = answers(BestOfN(n=3))
    below = 0.0
    for text, chance in own:
        assert found[text] == pytest.approx((below + chance) ** 3 - below**3)
        below += chance


def test_majority_is_binomial():
    """Three votes on two answers."""
    once = lambda text: {"$": 1.0} if text else {"a": 0.7, "b": 0.3}  # noqa: E731
    assert answers(Majority(n=3), once)["a"] == pytest.approx(0.7**3 + 3 * 0.7**2 * 0.3)


def test_first_finish_is_the_shortest():
    """Texts of a's end after each with the chance 0.4; the lengths of two, and the shorter one."""
    table = lambda text: {"a": 0.6, "$": 0.4} if len(text) < 3 else {"$": 1.0}  # noqa: E731
    longer = [0.6**n for n in range(4)] + [0.0]  # at least so many
    found = answers(FirstFinish(n=2), table)
    for n in range(4):
        assert found["a" * n] == pytest.approx(longer[n] ** 2 - longer[n + 1] ** 2)


@pytest.mark.parametrize("votes", [1, 2, 3, 5])
def test_the_sum_of_judgements_decides(votes):
    """Two texts that differ, each judged by 0 or 1 in independent draws: the chance that the better one's sum is the
    larger, by binomials; of equal sums the first text's, which is either one as often."""
    chances, once = {"a": 0.8, "b": 0.4}, lambda text: {"$": 1.0} if text else {"a": 0.5, "b": 0.5}
    binomial = {
        text: [math.comb(votes, k) * p**k * (1 - p) ** (votes - k) for k in range(votes + 1)]
        for text, p in chances.items()
    }
    pairs = list(itertools.product(range(votes + 1), repeat=2))
    better = sum(binomial["a"][i] * binomial["b"][j] * (1.0 if i > j else 0.5 * (i == j)) for i, j in pairs)
    found = 0.0
    for i, j in pairs:
        left: dict[str, list[float]] = {}

        def judged(text: str, finished: bool) -> float:
            if not left.get(text):  # noqa: B023
                ones = {"a": i, "b": j}[text]  # noqa: B023
                left[text] = [1.0] * ones + [0.0] * (votes - ones)  # noqa: B023
            return left[text].pop()  # noqa: B023

        for each in outcomes(RewardVoting(n=2, votes=votes).run, once, judged):
            if len({leaf.text for leaf in each.play.search.leaves}) == 2 and each.text == "a":
                found += binomial["a"][i] * binomial["b"][j] * each.probability
    assert found == pytest.approx(0.5 * better), "half of the pairs differ"


def test_a_verifier_that_is_wrong_caps_accuracy():
    once = lambda text: {"$": 1.0} if text else {"a": 0.2, "b": 0.1, "c": 0.7}  # noqa: E731
    passes = lambda text, finished: float(text in ("a", "b"))  # noqa: E731
    right = sum(
        each.probability
        for each in outcomes(UntilAccepted(tries=3).run, once, passes)
        if each.text == "a" and each.play.search.notes["accepted"]
    )
    assert right == pytest.approx(sum(0.2 * (1 - 0.2 - 0.1) ** before for before in range(3)))


def test_a_star_finds_the_optimum_of_what_it_opened():
    """Where both letters were drawn each time, the text with the least surprise, with a heuristic that is admissible:
    the least surprise that can still come. A uniform-cost search, without one, opens no fewer."""

    def table(text: str) -> dict[str, float]:
        return {"$": 1.0} if len(text) >= 2 else {"a": 0.55 - 0.1 * len(text), "b": 0.45 + 0.1 * len(text)}

    def still(text: str) -> float:
        return sum(-math.log(max(table("a" * length).values())) for length in range(len(text), 2))

    best = max(texts(table), key=lambda text: texts(table)[text])
    opened = []
    for scored in (lambda text, finished: 1 - still(text), lambda text, finished: 1.0):
        counts = []
        for each in outcomes(AStar(expand=2, surprise=1.0).run, table, scored, step=""):
            tree = each.play.search.branches
            open_ones = [node for node in tree if node.children and len(node.text) < 2]
            if all(len({child.text for child in tree if child.parent is node}) == 2 for node in open_ones):
                assert each.text == best
                counts.append(each.play.search.notes["opened"])
        opened.append(counts)
    assert opened[0] and max(opened[0]) <= min(opened[1])


def exhaustive(weights, nodes, clusters, sharing, diversity) -> tuple[int, ...]:
    """The best of all sets of leaves."""
    sets = itertools.chain.from_iterable(
        itertools.combinations(range(len(weights)), n + 1) for n in range(len(weights))
    )
    return max(sets, key=lambda chosen: worth(chosen, weights, nodes, clusters, sharing, diversity))


@pytest.mark.parametrize("seed", range(12))
def test_ets_chooses_what_trying_all_sets_finds(seed):
    draw = numpy_generator(seed, "ets")
    leaves = int(draw.integers(1, 8))
    weights = draw.integers(0, 6, leaves).astype(float).tolist()
    nodes = [{0, *draw.integers(1, 6, 3).tolist(), 10 + leaf} for leaf in range(leaves)]
    clusters = [str(each) for each in draw.integers(0, 3, leaves)]
    for sharing, diversity in ((0.0, 0.0), (1.0, 1.0), (2.0, 0.3), (0.2, 3.0)):
        given = (weights, nodes, clusters, sharing, diversity)
        assert worth(select(*given), *given) == pytest.approx(worth(exhaustive(*given), *given))
    whole = select(weights, nodes, clusters, 0.0, 0.0)
    assert sum(weights[place] for place in whole) == sum(weights), "without a price, all weight is kept"


def test_nodes_that_ets_keeps_fall_with_their_price():
    draw = numpy_generator(0, "ets/price")
    weights = draw.random(8).tolist()
    nodes = [{0, 1 + leaf // 4, 3 + leaf // 2, 10 + leaf} for leaf in range(8)]
    kept = [
        len(set().union(*(nodes[place] for place in select(weights, nodes, ["x"] * 8, price, 0.0))))
        for price in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1] == 4


def test_ets_without_prices_keeps_every_leaf_that_weighs():
    found = answers(EfficientTreeSearch(width=2, sharing=0.0, diversity=0.0, temperature=1.0))
    assert found["ab"] > texts(chain)["ab"]


def test_rebase_gives_out_the_whole_width():
    for seed in range(30):
        draw = numpy_generator(seed, "rebase")
        scores = draw.random(int(draw.integers(1, 9))).tolist()
        width = int(draw.integers(1, 17))
        counts = rebase(scores, width, 0.2)
        assert sum(counts) == width and min(counts) >= 0
        order = sorted(range(len(scores)), key=lambda place: scores[place])
        assert [counts[place] for place in order] == sorted(counts)
