"""Puzzles: their solutions are right, wrong ones are not, and what is held out is never trained on."""

from __future__ import annotations

import itertools
import re
import statistics

import pytest

from penstock.data.corpora.puzzles import Puzzles
from penstock.data.puzzles import KINDS, Kind, puzzle, puzzles, right


@pytest.mark.parametrize("hardest", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_right(kind, hardest):
    for seed in range(60):
        found = puzzle(kind, seed, hardest)
        assert found == puzzle(kind, seed, hardest), "the seed decides"
        if kind == "functions":
            scope: dict = {}
            exec(found.facts["code"] + found.solution + "\n".join(found.facts["tests"]), scope)
        assert right(kind, found.facts, found.solution)


def test_wrong_answers_are_wrong():
    tests = {"tests": ["assert f(1) == 4", "assert f(-3) == 0"]}
    assert right("functions", tests, "    return x + 3\n")
    for text in (
        "return x + 2",
        "return x +",
        "",
        "return 4",
        "return 9 ** 9 ** 9",
        "return f(x)",
        "x + 3",
        "return x + 3\n    pass",
    ):
        assert not right("functions", tests, "    " + text)
    facts = {"numbers": [3, 5, 7], "target": 22}
    assert right("countdown", facts, "3*5=15\n15+7=22\n")
    for text in (
        "",
        "3*5=15\n",
        "3*5=15\n15+7=23\n",
        "3*5=15\n3+7=10\n15+7=22",
        "3*5=16\n16+7=23\n",
        "22",
        "3*5 = 15\n15+7=22",
    ):
        assert not right("countdown", facts, text)
    given = ["1...", "..1.", ".1..", "...1"]
    assert right("sudoku", {"given": given}, "1234\n4312\n3142\n2431") is False
    solved = "1234\n3412\n4123\n2341"
    assert right("sudoku", {"given": ["1...", "....", "....", "...1"]}, solved)
    assert not right("sudoku", {"given": ["2...", "....", "....", "...."]}, solved), "what was given stays"
    assert not right("sudoku", {"given": ["...."] * 4}, "1234\n2341\n3412\n4123"), "a box has a number twice"
    assert not right("sudoku", {"given": ["...."] * 4}, "1234\n3412\n4123")
    six = ["123456", "456123", "231564", "564231", "312645", "645312"]
    facts = {"given": ["1.....", *["......"] * 5]}
    assert right("sudoku_6", facts, "\n".join(six))
    assert not right("sudoku_6", facts, "\n".join([six[0], *six[2:], six[1]])), "a box has a number twice"
    assert not right("sudoku_6", facts, "\n".join(six[::-1])), "what was given stays"
    assert not right("sudoku_6", facts, "\n".join(six[:5]))


def test_seeds_take_turns_among_levels_each_of_which_is_harder():
    """On average: Countdown has more numbers, and more is hidden of Sudokus and of the steps of functions."""

    def hides(kind: Kind, level: int) -> float:
        return statistics.fmean(
            len(found.facts["numbers"]) if kind == "countdown" else found.prompt.count("?") + found.prompt.count(".")
            for found in (puzzle(kind, seed, 4) for seed in range(level - 1, 200, 4))
        )

    for kind in KINDS:
        hidden = [hides(kind, level) for level in (1, 2, 3, 4)]
        assert hidden == sorted(set(hidden)), f"{kind}: {hidden}"
        assert puzzle(kind, 8, 4) == puzzle(kind, 8), "the first level is that without levels"


def test_what_a_function_is_shown_to_give_is_what_it_gives():
    for seed in range(1, 41, 4):
        found = puzzle("functions", seed, 4)
        scope: dict = {}
        exec(found.facts["code"] + found.solution, scope)
        shown = re.findall(r"; (-?\d+) to (-?\d+)", found.prompt)
        assert len(shown) == 4 and all(scope["f"](int(x)) == int(value) for x, value in shown)


@pytest.mark.parametrize("hardest", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_was_never_trained_on(kind, hardest):
    asked = {each.prompt for each in itertools.islice(puzzles(kind, held_out=True, hardest=hardest), 40)}
    trained = [document.text for document in Puzzles(count=900, hardest=hardest).documents()]
    assert not [text for text in trained if any(text.startswith(prompt) for prompt in asked)]
    assert all(len(text.splitlines()) > 2 for text in trained)
