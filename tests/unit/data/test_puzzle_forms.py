"""Forms in which programs ask for a puzzle's solution: what they show and say is true, by the checks of answers."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from penstock.data import puzzle_forms as forms
from penstock.data.corpora.puzzles import Puzzles
from penstock.data.puzzles import KINDS, OPERATIONS, Kind, Puzzle, puzzle, puzzles, right

#: Words behind which an answer stands to the end of the text.
LAST = (forms.ANSWER, forms.BEST, forms.AGAIN, forms.REPAIR)


def some(kind: Kind) -> list[Puzzle]:
    return [puzzle(kind, seed, 4) for seed in range(24)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_form_says_is_true(kind):
    draw, seen = random.Random(0), set()
    for each in some(kind):
        for form in forms.FORMS:
            if form in forms.OF_FUNCTIONS and kind != "functions":
                continue
            text = form(each, draw)
            seen.add(form)
            assert text != forms.answered(each) and not re.search("[A-Z]", each.prompt + each.solution)
            if forms.HARD in text:
                assert text == forms.HARD + (forms.YES if len(each.thought) > forms.LONG else forms.NO)
            elif forms.WHICH in text:
                shown, _, number = text.partition(forms.WHICH)
                items = re.split(r"ITEM\d:", shown)[1:]
                assert [right(kind, each.facts, item) for item in items] == [
                    place + 1 == int(number) for place in range(len(items))
                ]
            elif text.endswith((forms.RIGHT + forms.YES, forms.RIGHT + forms.NO)):
                answer, _, verdict = text.partition(forms.RIGHT)
                assert right(kind, each.facts, answer) == (verdict == forms.YES)
            elif forms.TESTS in text:
                tests = ("assert" + text.partition(forms.TESTS)[2]).splitlines()
                assert tests and set(tests) <= set(each.facts["tests"])
            else:
                place = max(text.rfind(word) + len(word) for word in LAST if word in text)
                assert right(kind, each.facts, text[place:]), text
            assert (forms.asked(each) + forms.answered(each)) == each.prompt + each.solution
    assert len(seen) == len({form for form in forms.FORMS if kind == "functions" or form not in forms.OF_FUNCTIONS})


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_answers_are_wrong(kind):
    draw = random.Random(1)
    for each in some(kind):
        assert not right(kind, each.facts, forms.spoiled(each, draw))


def test_thoughts_lead_to_solutions():
    for each in some("sudoku") + some("sudoku_6"):
        rows = zip(each.facts["given"], each.thought.split(), strict=True)
        filled = [re.sub(r"\.", lambda _, digits=iter(digits): next(digits), row) for row, digits in rows]
        assert "\n".join(filled) + "\n" == each.solution and filled[0] == each.outline
    for each in some("countdown"):
        lines = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line) for line in each.solution.splitlines()]
        assert each.thought.split() == [str(OPERATIONS[line[2]](int(line[1]), int(line[3]))) for line in lines if line]
        assert len(each.outline.split()) == len(lines)
    for each in some("functions"):
        steps = each.thought.split(", ")
        assert steps[0] == "x" and each.solution == f"    return {steps[-1]}\n"
        assert len(each.outline.split(", ")) == len(steps) - 1
        assert all(one in other for one, other in itertools.pairwise(steps))


@pytest.mark.parametrize("kind", KINDS)
def test_no_form_of_what_is_asked_was_trained_on(kind):
    asked = {forms.asked(each) for each in itertools.islice(puzzles(kind, held_out=True, hardest=2), 40)}
    trained = [document.text for document in Puzzles(count=900, hardest=2, formed=0.5).documents()]
    assert not [text for text in trained if any(text.startswith(prompt) for prompt in asked)]
    shown = sum(any(word in text for word in ("THINK", "RIGHT", "BEST", "HARD", "OUTLINE", "TESTS", "WHICH", "REPAIR"))
                for text in trained)  # fmt: skip
    assert 0.4 < shown / len(trained) < 0.6
