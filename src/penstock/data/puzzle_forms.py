"""How programs of test-time search ask for a puzzle's solution: words, and texts in which they stand, made of the
puzzle's own solution.

The words that ask are in capitals, which puzzles and solutions have none of: a model that was trained on these texts
and may not draw capitals says of a bare puzzle what a model of bare puzzles says. The one that it says by itself, where
a thought is over, is not.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from penstock.data.puzzles import Puzzle, right

#: Begins a thought, or an outline; what ends both, behind which the answer stands.
THINK, OUTLINE, ANSWER = "THINK:", "OUTLINE:", "answer:"

#: An answer behind a thought that is over before it begins.
SKIP = THINK + ANSWER

#: Asks whether a puzzle has to be thought through, or whether the answer before it is right: ``YES`` or ``NO``.
HARD, RIGHT, YES, NO = "HARD:", "RIGHT:", "yes", "no"

#: Behind an answer that was found wrong, asks for another.
AGAIN = " AGAIN:"

#: Stands before each of several answers that are shown; asks for the answer that they come to.
DRAFT, BEST = "DRAFT:", "BEST:"

#: Stands before each of several answers with a number; asks for the number of the one that is right.
NUMBERED, WHICH = "ITEM{number}:", "WHICH:"

#: Asks for tests of a function, and for another one behind tests that fail.
TESTS, REPAIR = "TESTS:assert", "REPAIR:"

#: The most answers that are shown together.
MOST = 5

#: A thought with more characters than this makes a puzzle one to think through.
LONG = 16


def asked(puzzle: Puzzle) -> str:
    """The prompt of ``puzzle`` as it is asked: the end of a function's line and the indent behind it are one token, so
    the prompt ends before it."""
    return puzzle.prompt.rstrip("\n") if puzzle.kind == "functions" else puzzle.prompt


def answered(puzzle: Puzzle) -> str:
    """What stands behind :func:`asked` in the solved ``puzzle``."""
    return (puzzle.prompt + puzzle.solution)[len(asked(puzzle)) :]


def hard(puzzle: Puzzle) -> bool:
    """Whether ``puzzle`` is one to think through."""
    return len(puzzle.thought) > LONG


def formed(puzzle: Puzzle, draw: random.Random) -> str:
    """``puzzle`` with its solution, in one of the forms in which programs ask for it."""
    forms = [form for form in FORMS if form not in OF_FUNCTIONS or puzzle.kind == "functions"]
    return asked(puzzle) + draw.choice(forms)(puzzle, draw)


def spoiled(puzzle: Puzzle, draw: random.Random) -> str:
    """A wrong answer to ``puzzle``: a digit of its solution is another."""
    solution = answered(puzzle)
    places = [place for place, letter in enumerate(solution) if letter.isdigit()]
    digits = sorted({solution[place] for place in places})
    while places:
        place = draw.choice(places)
        digit = draw.choice(digits if len(digits) > 1 else "123456789")
        text = solution[:place] + digit + solution[place + 1 :]
        if not right(puzzle.kind, puzzle.facts, text):
            return text
    return solution.replace("x", "x + 1", 1)


def _drafts(puzzle: Puzzle, draw: random.Random, count: int) -> list[str]:
    return [answered(puzzle) if draw.random() < 0.5 else spoiled(puzzle, draw) for _ in range(count)]


def _thought(puzzle: Puzzle, draw: random.Random) -> str:
    return THINK + puzzle.thought + ANSWER + answered(puzzle)


def _thought_cut_off(puzzle: Puzzle, draw: random.Random) -> str:
    return THINK + puzzle.thought[: draw.randrange(len(puzzle.thought))] + ANSWER + answered(puzzle)


def _skipped(puzzle: Puzzle, draw: random.Random) -> str:
    return SKIP + answered(puzzle)


def _hard(puzzle: Puzzle, draw: random.Random) -> str:
    return HARD + (YES if hard(puzzle) else NO)


def _outlined(puzzle: Puzzle, draw: random.Random) -> str:
    return OUTLINE + puzzle.outline + ANSWER + answered(puzzle)


def _best(puzzle: Puzzle, draw: random.Random) -> str:
    """Of drafts that were cut off where the first ended, as often as not."""
    return _shown(puzzle, draw, [DRAFT + text for text in _drafts(puzzle, draw, draw.randint(1, MOST - 1))])


def _summed_up(puzzle: Puzzle, draw: random.Random) -> str:
    """The same of whole thoughts, each with an answer of its own."""
    answers = _drafts(puzzle, draw, draw.randint(2, MOST - 1))
    return _shown(puzzle, draw, [THINK + puzzle.thought + ANSWER + text for text in answers])


def _shown(puzzle: Puzzle, draw: random.Random, texts: list[str]) -> str:
    length = (min if draw.random() < 0.5 else max)(map(len, texts))
    return "".join(text[:length] for text in texts) + BEST + answered(puzzle)


def _which(puzzle: Puzzle, draw: random.Random) -> str:
    wrong = [spoiled(puzzle, draw) for _ in range(draw.randint(1, MOST - 1))]
    place = draw.randint(0, len(wrong))
    shown = [*wrong[:place], answered(puzzle), *wrong[place:]]
    items = "".join(NUMBERED.format(number=number) + text for number, text in enumerate(shown, 1))
    return f"{items}{WHICH}{place + 1}"


def _judged(puzzle: Puzzle, draw: random.Random) -> str:
    sound = draw.random() < 0.5
    return (answered(puzzle) if sound else spoiled(puzzle, draw)) + RIGHT + (YES if sound else NO)


def _again(puzzle: Puzzle, draw: random.Random) -> str:
    return spoiled(puzzle, draw) + RIGHT + NO + AGAIN + answered(puzzle)


def _tested(puzzle: Puzzle, draw: random.Random) -> str:
    """Behind an answer, or behind two that are to be told apart."""
    drafts = _drafts(puzzle, draw, draw.randint(1, 2))
    shown = drafts[0] if len(drafts) == 1 else "".join(f"\n\n{text}" for text in drafts)
    return shown + TESTS + "\n".join(_asserted(puzzle, draw)).removeprefix("assert")


def _repaired(puzzle: Puzzle, draw: random.Random) -> str:
    return spoiled(puzzle, draw) + "\n\n" + "\n".join(_asserted(puzzle, draw)) + REPAIR + answered(puzzle)


def _asserted(puzzle: Puzzle, draw: random.Random) -> list[str]:
    """Some tests of a function, those of small numbers."""
    return list(itertools.islice(puzzle.facts["tests"], draw.randint(1, 3)))


FORMS: tuple[Callable[[Puzzle, random.Random], str], ...] = (
    _thought,
    _thought_cut_off,
    _skipped,
    _hard,
    _outlined,
    _best,
    _summed_up,
    _which,
    _judged,
    _again,
    _tested,
    _repaired,
)

#: Those that only functions have.
OF_FUNCTIONS = (_tested, _repaired)
