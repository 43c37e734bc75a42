"""The house: who may import whom, read from the source of all modules."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import penstock
from penstock.testing.house import ROWS, beside, imports, room, row

SOURCE = Path(penstock.__file__).parent


def between(pairs: Iterable[tuple[str, str]], of: Callable[[str], str]) -> set[tuple[str, str]]:
    """The imports between different rows, or rooms."""
    return {(of(one), of(other)) for one, other in pairs if of(one) != of(other)}


def misplaced(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that go down the rows, and those of ``train`` by ``serve``."""
    return sorted(
        (one, other)
        for one, other in between(pairs, row)
        if ROWS.index(one) < ROWS.index(other) or (one, other) == ("serve", "train")
    )


def circle(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Modules and packages side by side in one package, at any depth, that import each other in a circle, from one of
    them back to it; empty if none do."""
    graph: dict[str, set[str]] = {}
    for one, other in {beside(*pair) for pair in pairs}:
        if one != other:
            graph.setdefault(one, set()).add(other)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1][::-1])
    return []


@pytest.fixture(scope="module")
def house() -> list[tuple[str, str]]:
    """All imports of the package; ``penstock`` itself, which holds no more than the version, left out."""
    return [(one, other) for one, other in imports(SOURCE) if one != "__init__" and other != "__version__"]


def test_imports_go_up_the_rows(house):
    assert misplaced(house) == []


def test_nothing_imports_in_a_circle_at_any_depth(house):
    assert circle(house) == []


def test_the_engine_names_nobody_who_computes_for_it():
    """Not even for types: who computes fits its ``Executor``, and who drafts its ``DraftExecutor``."""
    for path in (SOURCE / "serve" / "engine").rglob("*.py"):
        assert "from penstock.serve.run" not in path.read_text(encoding="utf-8"), path


def test_schedules_as_data_need_nobody(house):
    """Whoever draws, simulates or runs a schedule needs ``ir``, and drawing does not need processes."""
    rooms = between(house, room)
    needed = {other for one, other in rooms if one == "pipeline.ir"}
    assert not any(other.startswith("pipeline.") for other in needed)
    assert {other for one, other in rooms if one == "pipeline.draw"} == {"pipeline.ir", "pipeline.simulate"}
    assert not any(other.startswith("pipeline.run") for one, other in rooms if one == "pipeline.simulate")


@pytest.mark.parametrize(
    ("text", "wrong", "turns"),
    [
        ("from penstock.cli import main", [("ops", "cli")], []),
        ("def late():\n    import penstock.serve.engine", [("ops", "serve")], []),
        ("if TYPE_CHECKING:\n    from penstock.cli import main", [], []),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from penstock.cli import main", [("ops", "cli")], []),
        ("from penstock.ops import two", [], ["ops.one", "ops.two", "ops.one"]),
        ("from penstock.core.errors import UsageError", [], []),
    ],
)
def test_what_is_wrong_is_found(tmp_path, text, wrong, turns):
    (tmp_path / "ops" / "two").mkdir(parents=True)
    (tmp_path / "ops" / "two" / "__init__.py").touch()
    (tmp_path / "ops" / "one.py").write_text(text)
    (tmp_path / "ops" / "two" / "deep.py").write_text("from penstock.ops.one import late")
    found = list(imports(tmp_path))
    assert misplaced(found) == wrong
    assert set(circle(found)) == set(turns)


@pytest.mark.parametrize(
    ("pairs", "turns"),
    [
        ([("serve.http.text", "serve.http.shapes.chats"), ("serve.http.shapes.blocks", "serve.http.text")], True),
        ([("serve.kv.pool", "serve.kv.tiers"), ("serve.kv.tiers", "serve.kv.pool")], True),
        ([("models.hub.__init__", "models.hub.loading"), ("models.hub.loading", "models.hub")], True),
        # A room may know files beside it, and be known by others.
        ([("serve.http.service", "serve.http.shapes.chats"), ("serve.http.shapes.chats", "serve.http.text")], False),
        ([("data.store", "data.corpora.contract"), ("data.corpora.puzzles", "data.puzzles")], False),
    ],
)
def test_a_circle_is_found_at_any_depth(pairs, turns):
    assert bool(circle(pairs)) == turns


def test_serving_and_training_know_nothing_of_each_other():
    assert misplaced([("serve.engine", "train.loop"), ("train.loop", "serve.engine"), ("rl.loop", "train.loop")]) == [
        ("serve", "train"),
        ("train", "serve"),
    ]
