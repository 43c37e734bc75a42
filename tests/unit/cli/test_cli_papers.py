"""``penstock papers``."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock import policy as registry
from penstock.cli import build_app
from penstock.core import results
from penstock.core.errors import UsageError
from penstock.core.results import Result, Row
from penstock.papers.catalogue import bibliography
from penstock.policy import Contract, Entry, Index


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """Two schedules of papers 3 and 21, of which the first is measured, and a route of paper 4, which nothing runs."""
    entries = [
        Entry(contract, name, (paper,), "", name, name, Path(f"/schedules/{name}.py"), "Waits. Ours: how long.")
        for contract, name, paper in (
            ("test.schedule", "zb_h1", 3), ("test.schedule", "v_half", 21), ("test.route", "skip", 4),
        )
    ]  # fmt: skip
    index = Index(
        {
            "test.schedule": Contract("test.schedule", "no task waits [for ever]", "m", "C"),
            "test.route": Contract("test.route", "none twice", "m", "R", simulated=True),
        },
        {(entry.contract, entry.name): entry for entry in entries},
    )
    row = Row(
        subject="zb_h1", setting="8 stages", metric="bubble", value=0.1, unit="of the time", better="lower",
        peer="1f1b", peer_value=0.2, ratio=0.5, papers=(3,),
    )  # fmt: skip
    measured = Result(
        name="pipeline", device="cpu-2", hardware="h", date=datetime.date(2026, 1, 31), versions={}, commit="c",
        rows=(row,),
    )  # fmt: skip
    monkeypatch.setattr(registry, "index", lambda: index)
    monkeypatch.setattr(results, "read_results", lambda folder: [measured])


def papers(*arguments: str) -> str:
    done = CliRunner().invoke(build_app(), ["papers", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def listed(*arguments: str) -> list[dict]:
    return json.loads(papers(*arguments, "--json"))


def test_what_works_is_shown_and_the_rest_only_on_request():
    assert [(p["id"], p["status"]) for p in listed()] == [(3, "measured"), (21, "implemented"), (4, "simulated")]
    everything = listed("--planned")
    assert [p["id"] for p in everything[:3]] == [3, 21, 4]
    assert {p["id"] for p in everything} == {paper.id for paper in bibliography().papers}
    assert {p["status"] for p in everything[3:]} == {"planned"}


def test_the_table_names_policies_and_says_how_many_are_left():
    shown = papers()
    assert "Zero Bubble Pipeline Parallelism" in shown
    assert "test.schedule/v_half" in shown
    assert f"{len(bibliography().papers) - 3} more are planned: --planned shows them" in shown
    assert "GPipe" not in shown
    assert "GPipe" in papers("--planned")


def test_one_family():
    assert listed("--family", "moe") == []
    planned = listed("--family", "moe", "--planned")
    assert {p["family"] for p in planned} == {"moe"}
    assert len(planned) == sum(paper.family == "moe" for paper in bibliography().papers)
    assert "22 more are planned" in papers("--family", "moe")


def test_one_paper_shows_the_claim_beside_the_figure_and_the_law():
    shown = papers("3")
    paper = bibliography().paper(3)
    assert paper.title in shown
    assert paper.claim in shown
    assert "test.schedule/zb_h1  /schedules/zb_h1.py" in shown
    assert "no task waits [for ever]" in shown
    assert "confirmed" in shown
    assert "zb_h1: bubble 0.5000× that of 1f1b (8 stages); lower is better [pipeline on cpu-2, 2026-01-31]" in shown
    assert "How long." in shown


def test_one_paper_says_what_is_missing():
    shown = papers("4")
    assert "not tested" in shown
    assert "No trainer or server takes a policy of test.route yet." in shown


def test_one_paper_as_json():
    found = json.loads(papers("3", "--json"))
    assert found["title"] == "Zero Bubble Pipeline Parallelism"
    assert found["policies"][0]["law"] == "no task waits [for ever]"
    assert found["evidence"][0]["ratio"] == 0.5


def test_a_planned_paper_can_be_shown_too():
    assert "planned" in papers("51")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99999"], "there is no paper 99999: the nearest are 465"),
        (["--family", "pipelnie"], "there is no family 'pipelnie': did you mean 'pipeline'"),
        (["3", "--family", "pipeline"], "give an ID or --family, not both"),
    ],
)
def test_wrong_requests_are_usage_errors(arguments, message):
    with pytest.raises(UsageError, match=message):
        papers(*arguments)
