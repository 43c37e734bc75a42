"""Puzzles with answers that can be checked, made with seeds: small Python functions, Countdown, 4x4 and 6x6 Sudoku.

How hard one is, is its level, from 1 on. With each, more of a Sudoku is hidden, and Countdown has another number, and
larger ones; of a function, from level 2 on, as many steps are not said as the level is above 1, and what it gives for
some numbers is said instead; from level 3 on it has more steps. Seeds take turns among the levels up to the hardest, so
that a model that solves the easy ones is left some that it does not.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

Kind = Literal["functions", "countdown", "sudoku", "sudoku_6"]

KINDS: tuple[Kind, ...] = ("functions", "countdown", "sudoku", "sudoku_6")

#: One prompt in so many is held out, whatever seed it comes up with.
HELD_OUT = 10

#: What a function is said to do, and the expression for it; {x} is what it is done to, {k} a digit.
STEPS = {
    "add {k}": "{x} + {k}",
    "subtract {k}": "{x} - {k}",
    "multiply by {k}": "({x}) * {k}",
    "square": "({x}) ** 2",
    "negate": "-({x})",
}

#: What harder functions are shown to give something for, and below which that is for the last of these.
SHOWN, LARGE = (0, 1, 2, 4), 10_000

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}

#: What they are called in an outline.
NAMES = {"+": "plus", "-": "less", "*": "times"}

#: A line of a Countdown solution.
LINE = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A puzzle with a solution of it.

    Attributes:
        kind: functions, countdown, sudoku of 4x4 or of 6x6.
        prompt, solution: texts; the one stands behind the other.
        facts: what checks an answer: the ``tests`` and the ``code`` before them, the ``numbers`` and the ``target``, or
            the ``given`` rows.
        thought: how it comes about: the expression after each step, what each operation makes, or what is missing in
            each row.
        outline: what is done, or the first row.
    """

    kind: Kind
    prompt: str
    solution: str
    facts: dict[str, Any]
    thought: str
    outline: str

    @property
    def held_out(self) -> bool:
        """Whether it is for tests: by its prompt alone, so that no seed can bring it into training."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT == 0


def puzzle(kind: Kind, seed: int, hardest: int = 1) -> Puzzle:
    """The puzzle of this kind with this seed, of a level up to the ``hardest``."""
    return MAKERS[kind](random.Random(f"{kind} {seed}"), 1 + seed % hardest)


def puzzles(kind: Kind, held_out: bool, hardest: int = 1) -> Iterator[Puzzle]:
    """All puzzles of this kind for training, or those that are held out, without end; one may come again."""
    seed = 0
    while True:
        found = puzzle(kind, seed, hardest)
        if found.held_out == held_out:
            yield found
        seed += 1


def right(kind: Kind, facts: dict[str, Any], text: str) -> bool:
    """Whether ``text`` solves a puzzle. A function is right where it is an expression of ``x``, digits and the signs
    that puzzles have, and passes the tests; it is worked out, not run. Other programs are for ``unit_tests``."""
    lines = text.strip().splitlines()
    if kind == "functions":
        return _computed(facts["tests"], text)
    if kind == "countdown":
        return _counted(facts["numbers"], facts["target"], lines)
    return _solved(facts["given"], lines)


def _function(draw: random.Random, level: int) -> Puzzle:
    while True:
        steps = [
            (draw.choice(list(STEPS.items())), draw.randint(2, 9))
            for _ in range(draw.choice((2, 2, 3)) + (level - 1) // 2)
        ]
        expression, thought = "x", ["x"]
        for (_, code), digit in steps:
            expression = code.format(x=expression, k=digit)
            thought.append(expression)
        value = eval(compile(ast.parse(f"lambda x: {expression}", mode="eval"), "puzzle", "eval"))  # our own text
        if level == 1 or abs(value(SHOWN[-1])) < LARGE:
            break
    said = [words.format(k=digit) for (words, _), digit in steps]
    outline = ", ".join(said)
    for place in draw.sample(range(len(said)), min(level - 1, len(said))):
        said[place] = "?"
    shown = "".join(f"; {x} to {value(x)}" for x in SHOWN) if level > 1 else ""
    prompt = f'def f(x):\n    """{", ".join(said)}{shown}"""\n'
    tests = [f"assert f({x}) == {value(x)}" for x in (0, 1, 2, 5, -3)]
    facts = {"code": prompt, "tests": tests}
    return Puzzle("functions", prompt, f"    return {expression}\n", facts, ", ".join(thought), outline)


def _countdown(draw: random.Random, level: int) -> Puzzle:
    while True:
        numbers = [draw.randint(1, 1 + 8 * level) for _ in range(2 + level)]
        left, lines, signs = list(numbers), [], []
        while len(left) > 1:
            one, other = (left.pop(draw.randrange(len(left))) for _ in range(2))
            sign = draw.choice(list(OPERATIONS))
            made = OPERATIONS[sign](one, other)
            lines.append(f"{one}{sign}{other}={made}\n")
            signs.append(NAMES[sign])
            left.append(made)
        if all("=-" not in line and int(line.split("=")[1]) < 100 * level for line in lines):
            break
    prompt, facts = f"make {left[0]} of {' '.join(map(str, numbers))}\n", {"numbers": numbers, "target": left[0]}
    made_of = " ".join(line.strip().split("=")[1] for line in lines)
    return Puzzle("countdown", prompt, "".join(lines), facts, made_of, " ".join(signs))


def _sudoku(draw: random.Random, level: int) -> Puzzle:
    # The two squares from which all others of this size come by other names and orders.
    first, second = [1, 2, 3, 4], [3, 4, 1, 2]
    square = [first, second, *draw.choice([([2, 1, 4, 3], [4, 3, 2, 1]), ([2, 3, 4, 1], [4, 1, 2, 3])])]
    return _hidden("sudoku", _disguised(square, draw), min(draw.randint(5, 9) + level - 1, 12), draw)


def _sudoku_6(draw: random.Random, level: int) -> Puzzle:
    square = [[(3 * (row % 2) + row // 2 + column) % 6 + 1 for column in range(6)] for row in range(6)]
    return _hidden("sudoku_6", _disguised(square, draw), min(draw.randint(4, 10) + 5 * (level - 1), 26), draw)


def _disguised(square: list[list[int]], draw: random.Random) -> list[str]:
    """The rows of a Sudoku like ``square``, whose boxes are two rows high: other names, and other orders of rows and
    columns, within boxes and of boxes."""
    size = len(square)

    def shuffled(width: int) -> list[int]:
        groups = [range(first, first + width) for first in range(0, size, width)]
        return [place for group in draw.sample(groups, len(groups)) for place in draw.sample(group, width)]

    rows, columns, names = shuffled(2), shuffled(size // 2), draw.sample(range(1, size + 1), size)
    return ["".join(str(names[square[row][column] - 1]) for column in columns) for row in rows]


def _hidden(kind: Kind, solved: list[str], count: int, draw: random.Random) -> Puzzle:
    """The puzzle in which so many numbers of ``solved`` are not shown."""
    size = len(solved)
    hidden = set(draw.sample(range(size * size), count))
    given = [
        "".join("." if size * row + column in hidden else letter for column, letter in enumerate(line))
        for row, line in enumerate(solved)
    ]
    lines = "\n".join
    missing = [
        "".join(letter for said, letter in zip(shown, line, strict=True) if said == ".") or "0"
        for shown, line in zip(given, solved, strict=True)
    ]
    prompt, solution = f"sudoku\n{lines(given)}\n\n", f"{lines(solved)}\n"
    return Puzzle(kind, prompt, solution, {"given": given}, " ".join(missing), solved[0])


MAKERS: dict[Kind, Callable[[random.Random, int], Puzzle]] = {
    "functions": _function,
    "countdown": _countdown,
    "sudoku": _sudoku,
    "sudoku_6": _sudoku_6,
}


#: What an expression may be made of.
SIGNS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: pow,
    ast.USub: operator.neg,
}


def _computed(tests: list[str], text: str) -> bool:
    try:
        (found,) = ast.parse("def f(x):\n" + text.strip("\n").replace("return", " return", 1)).body
        assert isinstance(found, ast.FunctionDef) and isinstance(found.body[0], ast.Return) and len(found.body) == 1
        expression = found.body[0].value
        assert expression is not None
        for test in tests:
            x, wanted = map(int, re.findall(r"-?\d+", test))
            if _value(expression, x) != wanted:
                return False
    except (AssertionError, SyntaxError, ValueError, KeyError, RecursionError, MemoryError):
        return False
    return True


def _value(node: ast.expr, x: int) -> int:
    """Of an expression; small numbers only.

    Raises:
        ValueError, KeyError: it is made of something else.
    """
    if isinstance(node, ast.Name) and node.id == "x":
        return x
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp):
        return SIGNS[type(node.op)](_value(node.operand, x))
    if isinstance(node, ast.BinOp):
        one, other = _value(node.left, x), _value(node.right, x)
        if (isinstance(node.op, ast.Pow) and not 0 <= other <= 2) or abs(one) + abs(other) > 10**9:
            raise ValueError("too large")
        return SIGNS[type(node.op)](one, other)
    raise ValueError("not an expression of x")


def _counted(numbers: list[int], target: int, lines: list[str]) -> bool:
    left = Counter(numbers)
    for line in lines:
        found = LINE.fullmatch(line)
        if found is None:
            return False
        one, other, made = int(found[1]), int(found[3]), int(found[4])
        if OPERATIONS[found[2]](one, other) != made or Counter((one, other)) - left:
            return False
        left = left - Counter((one, other)) + Counter((made,))
    return left == Counter((target,))


def _solved(given: list[str], lines: list[str]) -> bool:
    size = len(given)
    if [len(line) for line in lines] != [size] * size:
        return False
    if any(
        said not in (".", found)
        for row, line in zip(given, lines, strict=True)
        for said, found in zip(row, line, strict=True)
    ):
        return False
    columns = ["".join(line[place] for line in lines) for place in range(size)]
    boxes = [
        lines[row][column : column + size // 2] + lines[row + 1][column : column + size // 2]
        for row in range(0, size, 2)
        for column in range(0, size, size // 2)
    ]
    return all(sorted(part) == sorted("123456"[:size]) for part in [*lines, *columns, *boxes])
