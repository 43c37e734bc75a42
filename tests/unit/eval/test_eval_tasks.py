"""What the tasks ask, and what they take for an answer."""

from __future__ import annotations

import itertools

import pytest

from penstock.core.errors import ConfigError
from penstock.data.building import is_held_out
from penstock.eval.contract import Sample
from penstock.eval.tasks.arithmetic import Arithmetic
from penstock.eval.tasks.code import Code
from penstock.eval.tasks.functions import FAMILIES, Functions
from penstock.eval.tasks.recall import Recall
from penstock.eval.tasks.sudoku import Sudoku, solved_grids
from penstock.policy import create


def all_grids() -> set[tuple[int, ...]]:
    """Every solved grid, by trying all rows."""
    rows = list(itertools.permutations(range(1, 5)))
    found = set()
    for grid in itertools.product(rows, repeat=4):
        columns = all(len({row[i] for row in grid}) == 4 for i in range(4))
        if columns and all(
            len({grid[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == 4 for r in (0, 2) for c in (0, 2)
        ):
            found.add(tuple(itertools.chain(*grid)))
    return found


def test_grids_are_all_that_there_are_and_a_puzzle_has_one_solution():
    grids = all_grids()
    assert set(solved_grids()) == grids
    assert len(grids) == 288
    for sample in Sudoku(samples=20, shots=0, empty=9).draw():
        cells = [0 if cell == "." else int(cell) for cell in sample.prompt.split()[1:17]]
        fits = [grid for grid in grids if all(cell in (0, number) for cell, number in zip(cells, grid, strict=True))]
        assert [" ".join(map(str, fits[0]))] == [" ".join(sample.reference.split())]
        assert len(fits) == 1


def test_a_grid_is_read_in_any_frame():
    task = Sudoku()
    sample = Sample("", "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", "")
    assert task.judge(sample, "The solution is:\n|1|2|3|4|\n|3|4|1|2|\n|2|1|4|3|\n|4|3|2|1|\n")
    assert task.judge(sample, "1234\n3412\n2143\n4321")
    assert not task.judge(sample, "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 2")
    assert not task.judge(sample, "1 2 3 4\n3 4 1 2\n2 1 4 3")


def test_the_last_number_is_the_result():
    task, sample = Arithmetic(), Sample("Q: What is 60 * 25?\nA:", " 1500", "")
    for text in (" 1500", "60 * 25 = 1,500.", "The answer is **1500**"):
        assert task.judge(sample, text) == 1, text
    for text in (" 150", "-1500", "1500 or 1501", "", "fifteen"):
        assert task.judge(sample, text) == 0, text
    assert task.judge(Sample("", " -7", ""), "It is -7")


def test_numbers_that_are_swapped_are_held_out_together():
    """Of one-digit numbers nearly all questions are drawn, so that a leak would show."""
    keys = {}
    for part in ("held_out", "train"):
        drawn = Arithmetic(digits=1, samples=40, shots=0, part=part).draw()
        keys[part] = {frozenset(sample.prompt.split()[3:6:2]) for sample in drawn}
        keys[part] = {frozenset(word.strip("?") for word in pair) for pair in keys[part]}
    assert not keys["held_out"] & keys["train"]


def test_where_there_are_too_few_questions_it_is_said():
    with pytest.raises(ConfigError, match=r"no more than \d+ different questions .* 5000 are wanted"):
        Arithmetic(digits=1, samples=5000).draw()


def test_a_recalled_number_stands_in_the_table_once():
    for sample in Recall(samples=5, pairs=20).draw():
        assert sample.prompt.count(f" is{sample.reference}.") >= 1
        assert len(sample.prompt.splitlines()) == 20 + 3
        assert Recall().judge(sample, f"{sample.reference}.\nThe number of other is 7.") == 1
        assert Recall().judge(sample, " 12345") == 0


def test_pieces_of_code_are_whole_lines_of_documents_that_are_held_out(tmp_path):
    texts = [f"# text {number}\n" + f"x = {number}\n" * 80 for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_text(text)
    corpus = create("data.corpus", "folder", path=tmp_path)
    held_out = [text for text in texts if is_held_out(text, 0.3)]
    drawn = Code(corpus=corpus, held_out=0.3, samples=10, context=50, length=30).draw()
    for sample in drawn:
        assert any(sample.prompt + sample.reference in text for text in held_out)
        assert sample.prompt.endswith("\n")
        assert 30 <= len(sample.reference) < 50
        assert len(sample.prompt) <= 50


def test_functions_of_every_family_are_drawn_and_tell_right_from_nearly_right():
    drawn = Functions(samples=120, shots=0).draw()
    assert {sample.key.split()[0] for sample in drawn} == {family.name for family in FAMILIES}
    sums = next(sample for sample in drawn if sample.key.startswith("sum_of_multiples"))
    right = sums.reference
    assert Functions().judge(sums, f"```python\n{sums.prompt}{right}\n```") == 1
    assert Functions().judge(sums, right.replace("== 0", "!= 0")) == 0
    assert Functions().judge(sums, "    return 0") == 0
