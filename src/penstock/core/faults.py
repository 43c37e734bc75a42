"""Which faults of an input to tell of, and where they are, out of all that pydantic finds.

Of a union pydantic tells the faults of every branch, and names the branch as a part of the place: a list with a picture
in it is said to be no string at ``messages.0.content.str``. A person wants the faults of the branch that was meant, at
a place of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

#: A place in an input: keys and indices.
Place = tuple[str | int, ...]


def faults(found: Iterable[Any], tree: Any) -> list[tuple[Place, Any]]:
    """Those of pydantic's errors that are worth telling, with their places in ``tree``, the input.

    The branch of a union that was meant is the one that goes along with the input farthest before it finds fault, then
    the one that finds the fewest values of another type, and then the one that finds the fewest faults. Where branches
    are alike, what they want is told in one.
    """
    told: list[tuple[Place, Any]] = []
    unions: dict[Place, dict[str, list[tuple[Place, Any]]]] = {}
    for fault in found:
        place, union, branch = _located(fault, tree)
        if branch is None:
            told.append((place, fault))
        else:
            if union not in unions:
                unions[union] = {}
                told.append((union, None))  # keeps its turn
            unions[union].setdefault(branch, []).append((place, fault))
    return [each for place, fault in told for each in ([(place, fault)] if fault else _meant(place, unions[place]))]


def _located(fault: Any, tree: Any) -> tuple[Place, Place, str | None]:
    """The place of a fault; the place of the union that it is of, and the branch, where there is one."""
    place: list[str | int] = []
    union: Place = ()
    branch = None
    for count, part in enumerate(fault["loc"], start=1):
        if _has(tree, part):
            tree = tree[part]
            place.append(part)
        elif _is_missing(fault, count) or (isinstance(tree, dict) and part in tree.values()):
            place.append(part)  # of a union, the branch that the input names itself
        elif branch is None:
            union, branch = tuple(place), str(part)
    return tuple(place), union, branch


def _is_missing(fault: Any, count: int) -> bool:
    """Whether the first ``count`` parts of the fault's place are a key that is not there."""
    return fault["type"] == "missing" and count == len(fault["loc"])


def _has(tree: Any, part: str | int) -> bool:
    if isinstance(tree, dict):
        return part in tree
    return isinstance(tree, Sequence) and not isinstance(tree, str) and isinstance(part, int) and part < len(tree)


def _meant(place: Place, branches: dict[str, list[tuple[Place, Any]]]) -> list[tuple[Place, Any]]:
    """The faults of the branch that was meant, of a union at ``place``."""
    farther = [own for own in branches.values() if any(len(where) > len(place) for where, _ in own)]
    ranks = [(sum(_is_of_type(fault) for _, fault in own), len(own)) for own in farther or branches.values()]
    best = [own for own, rank in zip(farther or branches.values(), ranks, strict=True) if rank == min(ranks)]
    where, first = best[0][0]
    if len(best) == 1 or any([place for place, _ in own] != [where] for own in best):
        return best[0]
    wishes = list(dict.fromkeys(fault["msg"] for own in best for _, fault in own))
    rest = (wish.removeprefix("Input should be ") for wish in wishes[1:])
    return [(where, first | {"msg": " or ".join([wishes[0], *rest])})]


def _is_of_type(fault: Any) -> bool:
    """Whether a value is not even of the type that is wanted."""
    return str(fault["type"]).endswith("_type")
