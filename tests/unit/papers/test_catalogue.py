"""The bibliography and where each paper stands."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError, UsageError
from penstock.core.results import Result, Row, Verdict, repository
from penstock.papers.catalogue import Paper, Status, bibliography, read_bibliography, shown_path, standings, tally
from penstock.policy import Contract, Entry, Index, index

PAPERS = [
    Paper(id=number, title=f"Paper {number}", family="f", kind="study", core=1 + number % 3) for number in range(8)
]


CONTRACTS = {
    "test.cut": Contract("test.cut", "law", "m", "Cut"),
    "test.drawing": Contract("test.drawing", "law", "m", "Drawing", simulated=True),
}


def entry(name: str, *papers: int, contract: str = "test.cut", docstring: str = "") -> Entry:
    return Entry(
        contract, name, papers, f"Cuts {name}.", f"cuts.{name}", name.title(), Path(f"/cuts/{name}.py"), docstring
    )


def index_of(*entries: Entry) -> Index:
    return Index(CONTRACTS, {(entry.contract, entry.name): entry for entry in entries})


def row(subject: str, *papers: int, ratio: float = 2.0, **fields) -> Row:
    """A figure of ``subject`` beside a baseline's, as evidence for ``papers``."""
    return Row(
        subject=subject, setting=fields.pop("setting", "s"), metric="m", value=ratio, unit="u", peer="plain",
        peer_value=1.0, ratio=ratio, papers=papers, **fields,
    )  # fmt: skip


def result(name: str, *rows: Row) -> Result:
    return Result(
        name=name, device="d", hardware="h", date=datetime.date(2026, 1, 31), versions={}, commit="c", rows=rows
    )


def test_the_bibliography_is_sorted_and_complete():
    library = bibliography()
    ids = [paper.id for paper in library.papers]
    assert ids == sorted(set(ids))
    assert {paper.family for paper in library.papers} == set(library.families)
    titles = [paper.title.casefold() for paper in library.papers]
    assert len(set(titles)) == len(titles)
    for paper in library.papers:
        assert library.paper(paper.id) is paper
        assert paper.title == paper.title.strip() != ""
        assert paper.code == "" or paper.code.startswith(("https://", "http://"))
        assert not set("\n\t\\$") & set(paper.title + paper.code)


@pytest.mark.parametrize(
    ("number", "title"),
    [(3, "Zero Bubble Pipeline Parallelism"), (110, "PipeDream: Fast and Efficient Pipeline Parallel DNN Training")],
)
def test_known_papers(number, title):
    assert bibliography().paper(number).title == title


def test_an_unknown_paper_or_family_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="there is no paper 100000: the nearest are 465, 464, 463"):
        bibliography().paper(100_000)
    with pytest.raises(UsageError, match="there is no family 'pipeln': did you mean 'pipeline'"):
        bibliography().family("pipeln")
    assert bibliography().family("moe") == "Mixture of experts"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("id = 1", "id = 0"), "paper 0 stands after paper 0: ids must ascend"),
        (("id = 1", "id = -1"), "papers.1.id: Input should be greater than or equal to 0"),
        (('family = "one"', 'family = "on"'), "paper 1 is of the unknown family 'on': did you mean 'one'?"),
        (('kind = "study"', 'kind = "stduy"'), "papers.1.kind: Input should be 'algorithm'"),
        (("core = 1", "core = 4"), "papers.1.core: Input should be less than or equal to 3"),
        (("core = 1", 'core = 1\nstatus = "done"'), "papers.1.status: unknown key"),
    ],
)
def test_a_fault_in_the_bibliography_is_named(tmp_path, change, fault):
    head = '[families]\none = "One"\n[[papers]]\nid = 0\ntitle = "A"\nfamily = "one"\nkind = "theory"\ncore = 2\n'
    tail = '[[papers]]\nid = 1\ntitle = "B"\nfamily = "one"\nkind = "study"\ncore = 1\n'
    path = tmp_path / "papers.toml"
    path.write_text(head + tail)
    assert [paper.title for paper in read_bibliography(path).papers] == ["A", "B"]
    path.write_text(head + tail.replace(*change))
    with pytest.raises(ConfigError) as caught:
        read_bibliography(path)
    assert fault in str(caught.value)
    assert str(path) in str(caught.value)


def test_status_is_derived():
    found = standings(
        PAPERS,
        index_of(entry("slant", 1, 2), entry("curve", 2, 5), entry("sketch", 3, 5, contract="test.drawing")),
        [
            result("a", row("a0", 2), row("a1"), row("a2", 6, simulated=True)),
            result(
                "b", row("b0", 1, simulated=True), row("b1", 7, 2, ratio=0.5), row("b2", 2, ratio=0.5, simulated=True)
            ),
        ],
    )
    by_id = {standing.paper.id: standing for standing in found}
    assert {number: standing.status for number, standing in by_id.items()} == {
        0: "planned", 1: "implemented", 2: "measured", 3: "simulated",
        4: "planned", 5: "implemented", 6: "simulated", 7: "measured",
    }  # fmt: skip
    assert [entry.name for entry in by_id[2].policies] == ["curve", "slant"]
    assert [figure.row.subject for figure in by_id[2].figures] == ["a0", "b1", "b2"]
    assert {number: standing.verdicts for number, standing in by_id.items() if standing.figures} == {
        1: "simulated: confirmed", 2: "1 confirmed, 1 contradicted; simulated: contradicted", 6: "simulated: confirmed",
        7: "contradicted",
    }  # fmt: skip
    assert by_id[3].verdicts == "not tested"


def test_a_mechanism_is_implemented_where_it_stands():
    index = dataclasses.replace(index_of(entry("slant", 1)), mechanisms=(entry("dig", 1, 4, contract="mechanism"),))
    by_id = {standing.paper.id: standing for standing in standings(PAPERS, index, [])}
    assert by_id[4].status == "implemented"
    assert [each.name for each in by_id[1].policies] == ["slant", "dig"]


SUBSETS = st.sets(st.integers(0, 7), max_size=4).map(tuple)


@given(SUBSETS, SUBSETS, SUBSETS)
def test_what_works_comes_first_and_then_what_is_central(drawn, implemented, measured):
    index = index_of(entry("any", *implemented), entry("sketch", *drawn, contract="test.drawing"))
    found = standings(PAPERS, index, [result("r", row("any", *measured))])
    assert sorted(standing.paper.id for standing in found) == list(range(8))
    assert {s.paper.id for s in found if s.status is Status.MEASURED} == set(measured)
    assert {s.paper.id for s in found if s.status is Status.IMPLEMENTED} == set(implemented) - set(measured)
    assert {s.paper.id for s in found if s.status is Status.SIMULATED} == set(drawn) - {*implemented, *measured}
    order = ["measured", "implemented", "simulated", "planned"]
    for before, after in itertools.pairwise(found):
        one, other = order.index(before.status), order.index(after.status)
        assert one < other or (one == other and before.paper.core >= after.paper.core)


def test_what_differs_in_its_setting_alone_is_one_finding():
    rows = [row("a", 1, ratio=ratio, setting=f"{ratio}") for ratio in (1.5, 0.5, 3.0)]
    (standing,) = standings(PAPERS[1:2], index_of(), [result("r", *rows, row("b", 1)), result("s", rows[0])])
    assert [(f.ratio, f.setting, f.verdicts, f.result.name) for f in standing.findings] == [
        ("0.5000×–3.000×", "3 settings", "2 confirmed, 1 contradicted", "r"),
        ("2.000×", "s", "confirmed", "r"),
        ("1.500×", "1.5", "confirmed", "s"),
    ]


@pytest.mark.parametrize(
    ("verdicts", "text"),
    [
        ([], "not tested"),
        ([None], "not tested"),
        (["confirmed", "confirmed"], "confirmed"),
        (["undecided", "contradicted", "confirmed", "undecided"], "1 confirmed, 1 contradicted, 2 undecided"),
    ],
)
def test_verdicts_are_counted_where_they_differ(verdicts, text):
    assert tally(None if verdict is None else Verdict(verdict) for verdict in verdicts) == text


def test_what_is_ours_and_what_is_missing_is_read_from_the_docstrings():
    text = "Bends it.\n\nFrom the paper: the bend. Ours: how far. That it stops is our reading.\n\n"
    text += "Not built: the saw that we\nneed. The hours pour."
    curve = entry("curve", 2, contract="test.drawing", docstring=text)
    (standing,) = standings(PAPERS[2:3], index_of(curve), [])
    assert standing.ours == ["How far.", "That it stops is our reading."]
    assert standing.not_built == [
        "No trainer or server takes a policy of test.drawing yet.",
        "The saw that we need.",
    ]


def test_a_contract_that_is_only_simulated_is_no_setting_of_anything_that_runs():
    """And one that is not is a setting, or is named where something runs: in the trainer, the server, the models, the
    data, the planner or the command line."""
    source = repository() / "src" / "penstock"
    taken = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r'Choice\(\s*"([a-z_.]+)"', path.read_text(encoding="utf-8"))
    }
    rooms = (source / room for room in ("train", "serve", "search", "models", "data", "plan", "ops"))
    users = [path for room in rooms for path in room.rglob("*.py")]
    users += [path for path in (source / "cli").glob("*.py") if path.name != "pipeline.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in users)
    named = {name for name in index().contracts if re.search(rf'(?<!@policy\()(?<!@contract\()"{name}"', text)}
    for contract in index().contracts.values():
        if contract.simulated:
            assert contract.name not in taken | named
        else:
            assert contract.name in taken | named


def test_a_standing_as_data():
    curve = entry("curve", 2, docstring="Bends it our way.")
    (standing,) = standings(PAPERS[2:3], index_of(curve), [result("a", row("a0", 2))])
    assert standing.describe({"test.cut": "the law"}) == {
        "id": 2, "title": "Paper 2", "family": "f", "kind": "study", "core": 3, "claim": "", "code": "",
        "status": "measured",
        "policies": [{"contract": "test.cut", "name": "curve", "path": "/cuts/curve.py", "law": "the law"}],
        "ours": ["Bends it our way."],
        "not_built": [],
        "evidence": [
            {
                "bench": "a", "device": "d", "date": "2026-01-31", "verdict": "confirmed", "subject": "a0",
                "setting": "s", "metric": "m", "value": 2.0, "unit": "u", "repetitions": 1, "better": "higher",
                "peer": "plain", "peer_value": 1.0, "ratio": 2.0, "claim": "gain", "simulated": False,
            }
        ],
    }  # fmt: skip


def test_paths_are_shown_from_the_root_of_the_source_tree(tmp_path):
    assert shown_path(repository() / "src" / "penstock" / "policy.py") == "src/penstock/policy.py"
    assert shown_path(tmp_path / "x.py") == str(tmp_path / "x.py")


def test_the_catalogue_needs_no_torch():
    script = (
        "import sys\nfrom penstock.papers.catalogue import bibliography, standings\nfrom penstock.policy import index\n"
        "from penstock.core.results import read_results, results_folder\n"
        "assert standings(bibliography().papers, index(), read_results(results_folder()))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
