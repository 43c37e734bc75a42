"""Which faults of an input are told, and where."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from penstock.core.faults import faults


class Part(BaseModel):
    kind: str
    width: int = 0


class Tree(BaseModel):
    content: str | list[Part] | None = None
    several: str | list[str] | list[int] | list[list[int]] = ""
    small: Part | None = None


@pytest.mark.parametrize(
    ("tree", "places"),
    [
        ({"content": [{"kind": "a"}, {"kind": 5}]}, [("content", 1, "kind")]),
        ({"content": [{"kind": "a", "width": "x"}, {}]}, [("content", 0, "width"), ("content", 1, "kind")]),
        ({"content": ["a"]}, [("content", 0)]),
        ({"content": 5}, [("content",)]),
        ({"several": {}}, [("several",)]),
        ({"several": [[1], [2, "x"]]}, [("several", 1, 1)]),
        ({"several": ["a", 3, "b"]}, [("several", 1)]),
        ({"several": [1, 2, "x"]}, [("several", 2)]),
        ({"small": {"width": 1}, "content": {}}, [("content",), ("small", "kind")]),
    ],
)
def test_the_branch_that_was_meant_is_told_at_its_place(tree, places):
    assert [place for place, _ in told(tree)] == places


def test_where_nothing_fits_all_wishes_are_told():
    ((_, fault),) = told({"content": 5})
    assert fault["msg"] == "Input should be a valid string or a valid list"


def told(tree: dict[str, Any]) -> list[tuple[Any, Any]]:
    with pytest.raises(ValidationError) as caught:
        Tree.model_validate(tree, strict=True)
    return faults(caught.value.errors(), tree)
