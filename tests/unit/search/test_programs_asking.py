"""Programs that ask models, and those that cut texts, on models that are tables: against closed forms."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest

from penstock.core.randomness import numpy_generator
from penstock.search.allocation import Allocation, fit
from penstock.search.programs.adaptive_sampling import AdaptiveSampling
from penstock.search.programs.cascade import Cascade
from penstock.search.programs.codemonkeys import CodeMonkeys, assertions
from penstock.search.programs.cot_switch import ThoughtSwitch
from penstock.search.programs.elastic import Elastic
from penstock.search.programs.hedged import Hedged, chosen
from penstock.search.programs.latts import LocallyAdaptive
from penstock.search.programs.meta_ranking import MetaRanking
from penstock.search.programs.no_thinking import NoThinking
from penstock.search.programs.outline import Outline
from penstock.search.programs.parallel_thoughts import ParallelThoughts
from penstock.search.programs.pdr import ParallelDistillRefine
from penstock.search.programs.phi_decoding import PhiDecoding, phi
from penstock.search.programs.planning import Planning
from penstock.search.programs.priority import Priority
from penstock.search.programs.retrieval import Retrieval
from penstock.search.programs.solve_detect_verify import SolveDetectVerify
from penstock.search.shared.asking import said
from penstock.search.shared.retrieving import bm25, nearest
from penstock.testing.search_table import Letters, outcomes, tempered, texts


def once(**shares: float):
    """A letter, then the end."""
    return lambda text: {"$": 1.0} if text else shares


def liked(**scores: float):
    return lambda text, finished: scores.get(text, 0.0)


def played(program, table, worth=liked(), **options):
    found = list(outcomes(program.run, table, worth, **options))
    assert math.isclose(sum(each.probability for each in found), 1.0)
    return found


def answers(*given, **options) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for each in played(*given, **options):
        found[each.text] += each.probability
    return found


def test_without_thinking_is_the_best_of_n_behind_a_closed_thought():
    def table(text: str) -> dict[str, float]:
        assert text.startswith("c"), "a thought begins"
        return once(a=0.7, b=0.3)(text[1:])

    found = answers(NoThinking(n=2, skip="c"), table, liked(b=1.0))
    assert found == pytest.approx({"a": 0.49, "b": 0.51})


def test_elastic_budgets_hold_and_there_is_always_a_solution():
    def table(text: str) -> dict[str, float]:
        return {"b": 0.5, "$": 0.5} if "c" in text else {"a": 0.5, "c": 0.3, "$": 0.2}

    forced = 0.0
    for each in played(Elastic(thinking=2, solution=2, closing="c"), table):
        thought, answer = each.play.search.notes["thinking"], each.play.answer
        assert thought <= 2 and 1 <= len(answer.generated) <= 2
        assert each.play.search.ledger.generated == thought + len(answer.generated)
        assert "".join(answer.texts.decode(answer.tokens)).count("c") == 1
        forced += each.probability * each.play.search.notes["forced"]
    assert forced == pytest.approx(1 - 0.3 - 0.5 * 0.3)


def test_latts_accepts_steps_by_the_verifiers_law():
    """p(step) score / Z, with 1 / Z draws a step, as far as the tries reach."""
    program = LocallyAdaptive(tries=6, backtracks=0, restarts=0)
    found = played(program, once(a=0.7, b=0.3), liked(a=0.5, b=1.0), most=1)
    z = 0.7 * 0.5 + 0.3
    rest = (1 - z) ** 6  # where all were rejected; only a's are
    right = sum(each.probability for each in found if each.text == "b")
    assert right == pytest.approx((1 - rest) * 0.3 / z)
    assert sum(each.probability * each.play.search.notes["drawn"] for each in found) == pytest.approx((1 - rest) / z)


@pytest.mark.parametrize(("backtracks", "restarts"), [(0, 0), (2, 0), (0, 1), (1, 1)])
def test_latts_goes_back_from_dead_ends(backtracks, restarts):
    """Half of the first steps lead nowhere, and each way back is another draw of the first step."""
    program = LocallyAdaptive(tries=2, backtracks=backtracks, restarts=restarts)
    worth = lambda text, finished: 0.0 if finished and text == "a" else 1.0  # noqa: E731
    found = answers(program, once(a=0.5, b=0.5), worth, step="")
    assert found["b"] == pytest.approx(1 - 0.5 ** ((1 + backtracks) * (1 + restarts)))


def test_phi_is_the_mean_of_foresight_and_agreement():
    assert phi([0.0, math.log(2), math.log(2)], ["x", "x", "y"], 1.0) == pytest.approx(
        [(0.2 + 0.4) / 2, (0.4 + 0.4) / 2, (0.4 + 0.2) / 2]
    )

    def table(text: str) -> dict[str, float]:  # the likelier step has the unlikelier future
        if not text:
            return {"a": 0.6, "b": 0.4}
        return {"$": 1.0} if len(text) == 2 else {"a": 0.5, "c": 0.5} if text == "a" else {"a": 1.0}

    program = PhiDecoding(beams=1, candidates=2, foresight=1, temperature=1.0, narrow=9, agree=1.0, steps=1)
    found = answers(program, table, step="")
    # Of two unlike steps b has 2/3 by the gain of its future, and 1/2 by clusters.
    assert sum(chance for text, chance in found.items() if text[0] == "b") == pytest.approx(
        0.4**2 + 2 * 0.6 * 0.4 * (2 / 3 + 1 / 2) / 2
    )


def test_futures_that_agree_end_the_choosing():
    table = lambda text: {"$": 1.0} if len(text) == 4 else {"a": 1.0}  # noqa: E731
    for each in played(PhiDecoding(beams=1, candidates=2, foresight=2, agree=1.0, steps=3), table, step=""):
        assert each.text == "aaaa"
        assert each.play.search.ledger.generated == 2 + 2 * 2 + 4, "one choice, and then to the end"


def better(text: str) -> float:
    """How sure the table is that a new text is better."""
    return {"a": 0.9, "b": 0.1}[text[0]]


def judging(text: str) -> dict[str, float]:
    own, asked, reply = text.partition("c")
    if asked:
        return {"$": 1.0} if reply else {"e": better(own), "f": 1 - better(own)}
    return {"$": 1.0} if len(own) == 3 else {"b": 1.0} if own else {"a": 0.7, "b": 0.3}


def test_adaptive_sampling_stops_at_the_first_good_text():
    program = AdaptiveSampling(n=3, middle=0, question="c", yes="e", no="f")
    found = played(program, judging)
    mean = sum(each.probability * each.play.search.notes["samples"] for each in found)
    assert mean == pytest.approx((1 - 0.7**3) / 0.3), "geometric"
    good = sum(each.probability for each in found if each.text[0] == "b")
    assert good == pytest.approx(1 - 0.7**3)


def test_adaptive_sampling_gives_poor_texts_up_in_their_middle():
    program = AdaptiveSampling(n=2, middle=1, question="c", yes="e", no="f")
    for each in played(program, judging):
        poor = [node for node in each.play.search.branches if node.text.startswith("a") and len(node.tokens) > 2]
        first = each.play.search.branches[1].text
        assert each.play.search.notes["samples"] == (2 if first == "a" else 1)
        if first == "a":  # its second letter is never drawn
            assert not [node for node in poor if node.parent.parent is each.play.search.branches[1]]
        # A letter and a reply of what is given up; three letters, the end, and replies in the middle and at the end.
        last = 6 if first == "b" else 2 + 5
        assert each.play.search.ledger.generated == last


def test_solve_detect_verify_by_binomials():
    passes = {"a": 0.9, "b": 0.2}

    def table(text: str) -> dict[str, float]:
        own, asked, reply = text.rpartition("d")[2].partition("c")
        if asked:
            return {"$": 1.0} if reply else {"e": passes[own], "f": 1 - passes[own]}
        return once(a=0.4, b=0.6)(own)

    program = SolveDetectVerify(
        attempts=2, fast=2, complete="[ab]", question="c", yes="e", no="f", feedback="", again="d"
    )
    found = answers(program, table)
    # Both fast checks say yes; or they differ, and the slow one does.
    accept = {text: p * p + 2 * p * (1 - p) * p for text, p in passes.items()}
    rejected = 0.4 * (1 - accept["a"]) + 0.6 * (1 - accept["b"])
    wanted = 0.4 * accept["a"] * (1 + rejected) + 0.4 * (1 - accept["a"]) * rejected
    assert found["a"] == pytest.approx(wanted)
    slow = sum(each.probability * (each.play.search.notes["slow"] > 0) for each in played(program, table))
    differ = {text: 2 * p * (1 - p) for text, p in passes.items()}
    each_time = 0.4 * differ["a"] + 0.6 * differ["b"]
    both = sum(
        share * differ[text] * (1 - passes[text]) * each_time for text, share in (("a", 0.4), ("b", 0.6))
    )  # the first slow check rejects, and there is a second one
    assert slow == pytest.approx(each_time + (rejected * each_time - both))


def test_the_last_word_is_the_verdict():
    assert said("yes, no, but YES.", "yes", "no") is True
    assert said("nothing of note", "yes", "no") is None
    assert said("yes no", "yes", "no") is False


def tree(text: str) -> dict[str, float]:
    if len(text) == 3:
        return {"$": 1.0}
    first = 0.5 + 0.4 * math.sin(len(text) + 7 * text.count("b") + 1)
    return {"a": first, "b": 1 - first}


def by_priority(table, count: int) -> list[str]:
    """The definition, over all that could be expanded."""
    found: list[str] = []
    queue: list[tuple[float, int, str]] = []
    text = ""
    while True:
        begun = len(text)
        while not text.endswith("$"):
            chances = table(text)
            text += max(chances, key=lambda letter: chances[letter])
        for place in range(max(begun, 0), len(text)):
            for letter, chance in table(text[:place]).items():
                if letter != text[place]:
                    queue.append((-chance, len(queue), text[:place] + letter))
        found.append(text.rstrip("$"))
        if len(found) == count or not queue:
            return found
        best = min(queue)
        queue.remove(best)
        text = best[2]


def test_priority_sampling_expands_the_most_probable_token_that_waits():
    for count in (1, 3, 20):
        (only,) = played(Priority(n=count), tree)
        search = only.play.search
        found = [each.text for each in search.branches[1:]]
        assert found == by_priority(tree, count)
        assert len(set(found)) == len(found) == min(count, len(texts(tree)))


def test_planning_finds_what_greedy_decoding_misses():
    least = min(texts(tree), key=lambda text: texts(tree)[text])
    worth = lambda text, finished: sum(a == b for a, b in zip(text, least, strict=False)) / 3  # noqa: E731
    best = []
    for rollouts in range(1, 9):
        (only,) = played(Planning(rollouts=rollouts, top=2), tree, worth)
        tried = [each for each in only.play.search.branches if each.score is not None]
        assert len(tried) == rollouts and len({each.text for each in tried}) == rollouts, "nothing is tried twice"
        best.append(worth(only.text, True))
    assert best == sorted(best) and best[0] < 1 == best[-1]
    (all_of_it,) = played(Planning(rollouts=50, top=2), tree, worth)
    assert all_of_it.play.search.notes["rollouts"] == len(texts(tree)), "it ends where all is tried"


def test_pdr_is_its_markov_chain():
    def table(text: str) -> dict[str, float]:
        for mark, right in (("d", (0.9, 0.2)), ("c", (1.0, 0.0)), ("e", (0.8, 0.3))):
            before, found, after = text.rpartition(mark)
            if found:
                share = right[0] if "a" in before else right[1]
                return once(**{letter: p for letter, p in (("a", share), ("b", 1 - share)) if p})(after)
        return once(a=0.4, b=0.6)(text)

    def refined(drafted: float) -> float:
        any_right = 1 - (1 - drafted) ** 2
        return any_right * 0.9 + (1 - any_right) * 0.2

    first = refined(0.4)
    second = first * refined(0.8) + (1 - first) * refined(0.3)
    for rounds, wanted in ((1, first), (2, second)):
        program = ParallelDistillRefine(rounds=rounds, drafts=2, workspace=2, distil="c", refine="d", improve="e")
        found = played(program, table)
        assert sum(each.probability for each in found if each.text == "a") == pytest.approx(wanted)
        longest = max(len(node.tokens) for each in found for node in each.play.search.branches)
        assert longest <= 1 + 2 + 2 * 1 + 2 + 1 + 2, "the prompt, two drafts and the wording"


@pytest.mark.parametrize("least", [0.0, 0.6, 1.0])
def test_a_cascade_is_binomial(least):
    found = answers(Cascade(n=3, least=least), once(a=0.7, b=0.3), others={"strong": once(c=1.0)})
    alike = 0.7**3 + 0.3**3
    assert found["c"] == pytest.approx(1 - alike if least == 1.0 else 0.0)
    if least < 1:
        assert found["a"] == pytest.approx(0.7**3 + 3 * 0.7**2 * 0.3)


def test_meta_ranking_asks_the_strong_model_where_the_weak_one_loses():
    def table(text: str) -> dict[str, float]:
        if text.endswith("c"):
            return {"e": 0.9, "f": 0.1} if text.startswith("a") else {"e": 0.2, "f": 0.8}
        return once(a=0.7, b=0.3)(text)

    program = MetaRanking(better=2.0, worse=1.0, threshold=0.5, compare="c", yes="e", no="f")
    known = [{"prompt": "d", "answer": "g", "right": True}, {"prompt": "d", "answer": "h", "right": False}]
    found = answers(program, table, problem={"references": known}, others={"strong": once(c=1.0)})
    assert found == pytest.approx({"a": 0.7, "c": 0.3})
    assert program.total([True, False], known) == 1.0 and program.total([False, True], known) == -1.0
    assert answers(program, table, others={"strong": once(c=1.0)}) == pytest.approx({"c": 1.0})


def test_hedging_keeps_the_careful_text_unless_a_number_says_otherwise():
    for each in played(Hedged(n=3, hot=1.0), once(a=0.6, b=0.4)):
        drawn = {node.text for node in each.play.search.branches[1:4]}
        assert each.text == "a" and each.play.search.notes["unlike"] == len(drawn)
    for each in played(Hedged(n=2, hot=1.0, begin="c", choose="d"), once(a=0.6, b=0.4)):
        asked = each.play.search.branches[-1]
        if each.play.search.notes["unlike"] == 2:
            assert asked.texts.decode(asked.tokens[1 : asked.prompt]) == "cacbd"
    assert [chosen(text, 3) for text in ("2", " 3.", "none", "7", "0")] == [1, 2, 0, 0, 0]


def test_temperatures_of_tables_are_those_of_softmax():
    assert tempered([0.6, 0.4], 0) == [1.0, 0.0]
    assert tempered([0.8, 0.2], 0.5) == pytest.approx([16 / 17, 1 / 17])


def test_a_summary_sees_all_thoughts_and_none_waits():
    def table(text: str) -> dict[str, float]:
        if "d" in text:
            return once(g=1.0)(text.rpartition("d")[2])
        assert text.startswith("c"), "a thought begins"
        return {"a": 0.5, "b": 0.3, "$": 0.2} if len(text) < 3 else {"$": 1.0}

    for each in played(ParallelThoughts(thoughts=2, begin="c", summarise="d"), table):
        first, second, last = each.play.search.branches[2:5]
        seen = last.texts.decode(last.tokens[1 : last.prompt])
        assert seen == f"c{first.text}c{second.text}d" and each.text == "g"
        assert abs(len(first.generated) - len(second.generated)) <= 1


def test_documents_are_found_by_words():
    library = ["the cat sat", "a dog ran off", "the cat and the dog ran"]
    rare = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    mean = (3 + 4 + 6) / 3
    length = [3, 4, 6]
    wanted = [rare * 2.2 / (1 + 1.2 * (0.25 + 0.75 * length[place] / mean)) for place in (0, 2)]
    assert bm25("Cat!", library) == pytest.approx([wanted[0], 0.0, wanted[1]])
    assert nearest("cat", library, 5) == [0, 2] and nearest("bird", library, 2) == []


def test_questions_of_the_models_own_find_more():
    """The prompt shares a word with one document, and the question with another."""
    library = ["a hit", "e other", "i none"]

    def table(text: str) -> dict[str, float]:
        return {"e": 1.0} if len(text) < 30 and not text.endswith("e") else {"\n": 0.5, "$": 0.5}

    for rounds, wanted in ((0, [0]), (1, [0, 1])):
        for each in played(
            Retrieval(documents=1, shots=0, rounds=rounds), table, problem={"documents": library}, most=2
        ):
            assert each.play.search.notes["documents"] == wanted


def test_the_allocation_model_is_recovered_and_its_best_is_that_of_all():
    true = Allocation((0.4, 0.2, 0.3), (0.5, -0.1), -1.5)
    settings = [(k, m, n) for k in (0, 1, 2, 5, 10) for m in (0, 1, 3) for n in (0, 1, 3)]
    tasks = [(0.3, 0.1), (0.9, 0.7), (0.5, 0.2)]
    draw = numpy_generator(0, "allocation")
    seen = []
    for task in tasks:
        for setting in settings:
            logit = math.log(1 / true.accuracy(setting, task) - 1) + 0.01 * draw.standard_normal()
            seen.append((setting, task, 1 / (1 + math.exp(logit))))
    found = fit(seen)
    assert (*found.a, *found.b, found.c) == pytest.approx((*true.a, *true.b, true.c), abs=0.02)
    cost = lambda setting: 100 * setting[0] + 60 * setting[1] + 150 * setting[2]  # noqa: E731
    for budget in (0, 100, 400, 1000):
        best = found.best(settings, (0.6, 0.4), cost, budget)
        allowed = [each for each in settings if cost(each) <= budget]
        assert found.accuracy(best, (0.6, 0.4)) == max(found.accuracy(each, (0.6, 0.4)) for each in allowed)
    with pytest.raises(ValueError, match="no setting"):
        found.best(settings, (0, 0), cost, -1)
    with pytest.raises(ValueError, match="differ"):
        fit(seen[:3])


def test_tests_of_all_programs_vote():
    program = CodeMonkeys(trajectories=2, turns=1, testing="c", length=1)
    table = lambda text: once(a=0.7, b=0.3)(text) if "c" not in text else {"d": 1.0}  # noqa: E731
    found = answers(program, table, liked(b=1.0, a=0.5))
    assert found["b"] == pytest.approx(1 - 0.7**2)
    assert assertions("f(1) == 2\nassert f(2) == 3\n") == ["assert f(1) == 2", "assert f(2) == 3"]


def test_a_failed_program_is_written_anew_once_a_turn():
    program = CodeMonkeys(trajectories=1, turns=3, testing="c", length=1, repair="\nd")
    repair = Letters().decode(Letters().encode("\n\nassert e\nd"))

    def table(text: str) -> dict[str, float]:
        own, asked, _ = text.rpartition(repair)[2].partition("c")
        return {"e": 1.0} if asked else once(a=0.7, b=0.3)(own)

    found = answers(program, table, liked(b=1.0))
    assert found["b"] == pytest.approx(1 - 0.7**3)


def test_an_outline_is_worked_out_by_another():
    for each in played(
        Outline(tokens=2, model="strong", sketch="c", work="d"),
        lambda text: {"$": 1.0} if text.endswith("g") else {"g": 1.0},
        others={"strong": lambda text: {"a": 0.5, "b": 0.4, "$": 0.1}},
    ):
        last = each.play.answer
        outline = each.play.search.notes["outline"]
        assert len(outline) <= 2 and each.text == "g"
        assert last.texts.decode(last.tokens[1 : last.prompt]) == f"c{outline}d"


def test_an_outline_ends_where_the_model_begins_the_solution():
    """It writes a, or two of them, and then, half of the time, what stands before a solution."""

    def table(text: str) -> dict[str, float]:
        own, begun, solution = text.partition("d")
        if begun:
            return {"$": 1.0} if solution else {"g": 1.0}
        return {"a": 1.0} if own == "c" else {"a": 0.3, "d": 0.5, "$": 0.2}

    program = Outline(tokens=2, sketch="c", work="d")
    chances: dict[str, float] = defaultdict(float)
    for each in played(program, table):
        last, outline = each.play.answer, each.play.search.notes["outline"]
        assert each.text == "g" and set(outline) == {"a"}
        assert last.texts.decode(last.tokens[1 : last.prompt]) == f"c{outline}d", "it stands there once"
        chances[outline] += each.probability
    assert chances == pytest.approx({"a": 0.5 + 0.2, "aa": 0.3})


@pytest.mark.parametrize("needed", [0.2, 0.8])
def test_the_switch_follows_the_models_reply(needed):
    def table(text: str) -> dict[str, float]:
        if text == "c":
            return {"e": needed, "f": 1 - needed}
        return {"$": 1.0} if text[-1] in "ij" else {"i": 0.5, "j": 0.5}

    program = ThoughtSwitch(n=3, question="c", yes="e", no="f", long="g", short="h", prefixes=("a", "b"))
    for each in played(program, table, liked(i=1.0)):
        assert each.play.search.notes["needed"] == pytest.approx(needed)
        heads = [
            node.texts.decode(node.tokens[1:-1])[:2] for node in each.play.search.branches if node.score is not None
        ]
        tail = "g" if needed > 0.5 else "h"
        assert sorted(heads) == ["a" + tail, "a" + tail, "b" + tail]
