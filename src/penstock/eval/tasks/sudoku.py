"""Sudoku on four by four cells."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from penstock.eval.contract import Sample, Written
from penstock.policy import policy

#: A grid: 16 numbers from 1 to 4, row by row; 0 is an empty cell.
Grid = tuple[int, ...]


@policy("eval.task", "sudoku")
class Sudoku(Written):
    """Fills a grid of four by four cells, in which every row, column and quarter holds 1 to 4; there is one solution,
    and the answer must be that, row by row. Grids with the same solution are held out together.

    Attributes:
        empty: cells that are to be filled. Where a grid would have several solutions with so many, it has fewer.
    """

    empty: int = Field(6, ge=1, le=12)

    instruction: ClassVar[str] = (
        "Replace each dot by a number from 1 to 4, so that every row, every column and every quarter of the grid has "
        "each number once. Answer with the four rows of the last solution alone."
    )
    longest: ClassVar[int] = 48

    def question(self, draw: np.random.Generator) -> Sample:
        grids = solved_grids()
        solution = grids[int(draw.integers(len(grids)))]
        puzzle, empty = list(solution), 0
        for cell in draw.permutation(16).tolist():
            if empty == self.empty:
                break
            puzzle[cell] = 0
            if sum(1 for _ in itertools.islice(solutions(puzzle), 2)) == 1:
                empty += 1
            else:
                puzzle[cell] = solution[cell]
        return Sample(f"Puzzle:\n{written(puzzle)}\nSolution:\n", written(solution), written(solution))

    def judge(self, sample: Sample, text: str) -> float:
        rows = re.findall(r"^\W*([1-4])\W*([1-4])\W*([1-4])\W*([1-4])\W*$", text, re.MULTILINE)
        return float("\n".join(" ".join(row) for row in rows[-4:]) == sample.reference)


def written(grid: Sequence[int]) -> str:
    """A row a line, with a dot for an empty cell."""
    cells = ["." if number == 0 else str(number) for number in grid]
    return "\n".join(" ".join(cells[start : start + 4]) for start in range(0, 16, 4))


@functools.cache
def solved_grids() -> list[Grid]:
    """All 288 grids without an empty cell."""
    return list(solutions([0] * 16))


def solutions(grid: Sequence[int]) -> Iterator[Grid]:
    """All ways to fill the empty cells, the first of which is tried first."""
    if 0 not in grid:
        yield tuple(grid)
        return
    cell = grid.index(0)
    for number in range(1, 5):
        if all(grid[other] != number for other in _seen_from(cell)):
            yield from solutions([*grid[:cell], number, *grid[cell + 1 :]])


@functools.cache
def _seen_from(cell: int) -> list[int]:
    """The other cells of the row, the column and the quarter of a cell."""
    row, column = divmod(cell, 4)
    near = {(row, other) for other in range(4)} | {(other, column) for other in range(4)}
    near |= {(row // 2 * 2 + down, column // 2 * 2 + right) for down in range(2) for right in range(2)}
    return [4 * down + right for down, right in near - {(row, column)}]
