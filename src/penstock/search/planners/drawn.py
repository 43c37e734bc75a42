"""What the runs of ``penstock search`` have drawn, for planners to choose by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.ops.paged.selection import BlockSelection
from penstock.policy import create
from penstock.search.coverage import Accepted
from penstock.search.planners.contract import Candidate, Drawn
from penstock.search.runs import read_results
from penstock.serve.kv.policies.contract import CachePolicy


def candidates_of(folders: Sequence[Path], right: float = 1.0) -> list[Candidate]:
    """A candidate for each of ``folders``, named by its model: the results of searches that drew texts of the same
    problems, such as those of ``coverage``, with the attention that their cache policy says. A text is right where its
    score is ``right`` or more.

    Raises:
        UsageError: a folder has no such results, or has those of other problems, or of a model and an attention that
            another has.
    """
    found: dict[tuple[str, BlockSelection | None], Candidate] = {}
    problems: tuple[Any, int] | None = None
    for folder in folders:
        settings, records = read_results(folder)
        name, sparse = settings["model"], _sparse(settings)
        if (name, sparse) in found:
            raise UsageError(f"{folder} has the results of {name}, as one before it has")
        drawn = [_drawn(folder, record, right) for record in records]
        if problems is not None and problems != (settings["problems"], len(drawn)):
            raise UsageError(f"{folder} has the results of other problems than {folders[0]}")
        problems = settings["problems"], len(drawn)
        samples = min(len(each.lengths) for each in drawn)
        found[name, sparse] = Candidate(
            name,
            hub.read_config(hub.resolve(name)),
            tuple(Drawn(each.prompt, each.lengths[:samples], each.right[:samples]) for each in drawn),
            sparse,
        )
    return list(found.values())


def accepted_of(verified: Path, known: Path, least: float = 1.0, right: float = 1.0) -> list[Accepted]:
    """Of each problem, how many samples there are, and how many of them are accepted and right, and accepted and wrong.
    Two searches have drawn the same texts: in ``verified`` the scorer is the verifier, which accepts those with a score
    of ``least`` or more; in ``known`` it knows what is right, which has a score of ``right`` or more.

    Raises:
        UsageError: a folder has no such results, or they are of different texts.
    """
    runs = [read_results(folder)[1] for folder in (verified, known)]
    if [each["place"] for each in runs[0]] != [each["place"] for each in runs[1]]:
        raise UsageError(f"{known} has the results of other problems than {verified}")
    found = []
    for judged, truth in zip(*runs, strict=True):
        accepts, rights = _drawn(verified, judged, least).right, _drawn(known, truth, right).right
        texts = [[node["text"] for node in record["tree"]] for record in (judged, truth)]
        if texts[0] != texts[1]:
            raise UsageError(
                f"{known} has other texts of the problem {judged['id']} than {verified}",
                hint="Run both with the same model, seed and options, and with another --scorer.",
            )
        good = sum(accepted and true for accepted, true in zip(accepts, rights, strict=True))
        found.append((len(accepts), good, sum(accepts) - good))
    return found


def _sparse(settings: dict[str, Any]) -> BlockSelection | None:
    """What tokens behind the prompts of a run read; None for all."""
    kv = settings.get("kv") or "full"
    name, options = (kv, {}) if isinstance(kv, str) else (kv["name"], {key: kv[key] for key in kv if key != "name"})
    made = create("kv.policy", name, **options)
    assert isinstance(made, CachePolicy)
    return made.selection


def _drawn(folder: Path, record: dict[str, Any], right: float) -> Drawn:
    """What a result says was drawn."""
    root, *texts = record["tree"]
    behind = all(text["parent"] == root["number"] for text in texts)
    given = sum(text["tokens"] for text in texts) != record["ledger"]["generated"]
    if record["error"] or record["exhausted"] or not texts or not behind or given:
        why = record["error"] or ("the budget ended it" if record["exhausted"] else "more than texts was drawn")
        raise UsageError(
            f"{folder} does not say what texts of the problem {record['id']} come to: {why}",
            hint="Run penstock search with --program coverage, a scorer, and no budget.",
        )
    if any(text["score"] is None for text in texts):
        raise UsageError(f"{folder} does not say which texts are right", hint="Run penstock search with a --scorer.")
    return Drawn(
        record["ledger"]["prompt"],
        tuple(text["tokens"] for text in texts),
        tuple(text["score"] >= right for text in texts),
    )
