"""The generated parts of the documents. Whether those of this repository are fresh is asked by `make check`."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from penstock.core.errors import UsageError
from penstock.core.results import HEADINGS, Result, Row, repository
from penstock.papers.catalogue import Bibliography, Paper
from penstock.policy import Contract, Entry, Index

SCRIPT = repository() / "docs" / "generate.py"
spec = importlib.util.spec_from_file_location("generate_docs", SCRIPT)
generate = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = generate
spec.loader.exec_module(generate)


@pytest.fixture
def sources(tmp_path):
    """One contract with two policies, three papers, and a benchmark that ran on two devices."""
    entries = [
        Entry("test.cut", name, papers, f"Cuts {name}.", name, name, tmp_path / "src" / f"{name}.py", docstring)
        for name, papers, docstring in (
            ("straight", (), ""),
            (
                "slanted",
                (1, 2),
                "Cuts slanted. Ours: the angle of :class:`~.saws.Saw` in ``degrees``. Not built: the saw.",
            ),
        )
    ]
    index = Index(
        {"test.cut": Contract("test.cut", "a|b is kept", "m", "C")},
        {("test.cut", entry.name): entry for entry in entries},
    )
    library = Bibliography(
        families={"one": "First", "two": "Second"},
        papers=(
            Paper(id=1, title="A", family="two", kind="study", core=1, claim="10x", code="https://example.org"),
            Paper(id=2, title="B", family="one", kind="study", core=1, claim="20x"),
            Paper(id=3, title="C", family="one", kind="study", core=1),
        ),
    )
    results = [
        Result(
            name="cutting", device=device, hardware=f"{device} in full", date=datetime.date(2026, 1, 31),
            versions={"python": "3.11"}, commit="abc1234",
            rows=(
                Row(subject="slanted", setting="wood", metric="speed", value=value, low=value - 1, high=value + 1,
                    unit="m/s", repetitions=5, peer="straight", peer_value=2, ratio=value / 2, papers=(2,)),
            ),
        )
        for device, value in (("cpu-2", 5.0), ("h100", 50.0))
    ]  # fmt: skip
    return generate.Sources(tmp_path, index, library, results)


def render(sources, text: str, document: str = "docs/page.md") -> str:
    return generate.render(text, sources.root / document, sources)


def block(sources, marker: str, document: str = "docs/page.md") -> list[str]:
    """The lines between a marker and its end, blank ones left out."""
    rendered = render(sources, f"before\n\n<!-- {marker} -->\nstale\n<!-- end -->\n\nafter\n", document)
    assert rendered.startswith(f"before\n\n<!-- {marker} -->\n\n")
    assert rendered.endswith("\n\n<!-- end -->\n\nafter\n")
    assert "stale" not in rendered
    assert render(sources, rendered, document) == rendered
    return [line for line in rendered.splitlines()[3:-3] if line]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (SCRIPT.parent).glob("*.md"))])
def test_every_link_leads_to_a_file_and_to_a_heading(document):
    path = repository() / document
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_generating_needs_no_torch():
    script = (
        "import runpy, sys\n"
        f"generate = runpy.run_path({str(SCRIPT)!r})\n"
        "generate['main'](['--check'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_figures_of_every_device(sources):
    lines = block(sources, "figures: cutting")
    assert [line for line in lines if line.startswith("| slanted")] == [
        "| slanted | wood | speed ↑ | 5.000 m/s (4.000–6.000) | 5 | straight | 2.000 m/s | 2.500× |",
        "| slanted | wood | speed ↑ | 50.00 m/s (49.00–51.00) | 5 | straight | 2.000 m/s | 25.00× |",
    ]
    assert lines[0] == f"| {' | '.join(HEADINGS)} |"
    assert lines[3] == "cpu-2 in full; 2026-01-31, commit abc1234; python 3.11."


def test_figures_of_one_device(sources):
    lines = block(sources, "figures: cutting-h100")
    assert sum(line.startswith("| slanted") for line in lines) == 1
    assert lines[-1].startswith("h100 in full")


def with_row(sources, row: Row):
    """``sources`` with one more row in each of their results."""
    more = [result.model_copy(update={"rows": (*result.rows, row)}) for result in sources.results]
    return dataclasses.replace(sources, results=more)


def test_a_grid_has_subjects_down_and_settings_across(sources):
    iron = Row(subject="bent", setting="iron", metric="speed", value=1, unit="m/s", repetitions=1)
    other = Row(subject="bent", setting="wood", metric="depth", value=1, unit="m", repetitions=1)
    lines = block(with_row(with_row(sources, iron), other), "grid: cutting-h100,speed")
    assert lines[0] == "| speed | wood | iron |"
    assert lines[2:5] == ["| straight | 2.000 m/s |  |", "| slanted | 50.00 m/s |  |", "| bent |  | 1.000 m/s |"]
    assert lines[5].startswith("h100 in full")
    with pytest.raises(UsageError, match="no metric 'sped'"):
        block(sources, "grid: cutting,sped")


def test_comparisons_leave_out_what_has_no_peer(sources):
    alone = Row(subject="bent", setting="wood", metric="speed", value=1, unit="m/s", repetitions=1)
    sources = with_row(sources, alone)
    every, compared = (block(sources, f"{name}: cutting-h100") for name in ("figures", "comparisons"))
    assert [line for line in every if line not in compared] == ["| bent | wood | speed ↑ | 1.000 m/s | 1 |  |  |  |"]
    assert [line for line in every if line in compared] == compared


def test_devices_without_such_figures_have_no_table(sources):
    known, other = sources.results[0], Row(subject="bent", setting="wood", metric="depth", value=1, unit="m")
    bare = known.model_copy(update={"device": "bare", "hardware": "bare in full", "rows": (other,)})
    sources = dataclasses.replace(sources, results=[*sources.results, bare])
    assert not any("bare in full" in line for line in block(sources, "comparisons: cutting"))
    assert any("bare in full" in line for line in block(sources, "figures: cutting"))
    with pytest.raises(UsageError, match="of the kind"):
        block(sources, "comparisons: cutting-bare")


def test_comparisons_of_one_metric(sources):
    (row,) = (row for result in sources.results if result.device == "h100" for row in result.rows)
    sources = with_row(sources, row.model_copy(update={"metric": "loss of edge"}))
    (shown,) = (line for line in block(sources, "comparisons: cutting-h100,loss-of-edge") if row.subject in line)
    assert "loss of edge" in shown


@pytest.mark.parametrize(("document", "path"), [("docs/page.md", "../src/"), ("README.md", "src/")])
def test_policies_of_a_contract(sources, document, path):
    assert block(sources, "policies: test.cut", document)[2:] == [
        f"| [`test.cut/slanted`]({path}slanted.py) | Cuts slanted. | A; B |",
        f"| [`test.cut/straight`]({path}straight.py) | Cuts straight. |  |",
    ]


def test_contracts_and_their_laws(sources):
    assert block(sources, "contracts") == ["- `test.cut`: a|b is kept. Policies: `slanted`, `straight`."]
    drawn = dataclasses.replace(sources.index.contracts["test.cut"], simulated=True)
    sources = dataclasses.replace(sources, index=Index({"test.cut": drawn}, sources.index.policies))
    assert "Only simulated" in " ".join(block(sources, "contracts"))


def test_papers_by_area_with_their_details(sources):
    lines = block(sources, "papers")
    assert [line for line in lines if line.startswith("#")] == [
        "### First", "#### Paper 2", "### Second", "#### Paper 1",
    ]  # fmt: skip
    assert "| [2](#paper-2) | B | measured | confirmed |" in lines
    assert "| [1](#paper-1) | A | implemented | not tested |" in lines
    details = lines[lines.index("#### Paper 2") + 1 : lines.index("### Second")]
    assert details == [
        "B: **measured**.",
        "*Claimed:* 20x.",
        "- [`test.cut/slanted`](../src/slanted.py)",
        "*Ours:* The angle of `saws.Saw` in `degrees`.",
        "*Not built:* The saw.",
        "| Subject | Baseline | Metric | Ratio | Verdict | Setting | Device |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| slanted | straight | speed | 2.500× | confirmed | wood | cpu-2 |",
        "| slanted | straight | speed | 25.00× | confirmed | wood | h100 |",
    ]
    assert "A ([the authors' code](https://example.org)): **implemented**." in lines


def test_planned_papers_are_a_list(sources):
    assert block(sources, "papers: planned") == ["### First", "- 3: C"]


def test_long_text_is_wrapped(sources):
    """And links are not cut, however long."""
    text = f"{'word ' * 50}[a link](https://example.org/{'x' * 150}) {'word ' * 50}"
    lines = generate.wrapped(f"- {text}", "  ").splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(f"- {text}".split())
    assert [line for line in lines if len(line) > 120] == [line for line in lines if "example.org" in line]
    assert all(line.startswith("  ") for line in lines[1:])


CLAIMS = """
[[claim]]
label = "Cutting & sawing"
beside = "straight"
page = "docs/cuts.md#figures"
rows = [
    { label = "slow", file = "cutting-cpu-2" },
    { label = "fast", file = "cutting-h100", setting = "wood" },
]
"""


def test_claims_are_ratios_with_their_page(sources):
    (sources.root / "claims.toml").write_text(CLAIMS)
    assert block(sources, "ratios: claims.toml", "README.md")[2:] == [
        "| [Cutting & sawing](docs/cuts.md#figures) | straight | 2.50× to 25.00× |"
    ]
    assert "](cuts.md#figures)" in block(sources, "ratios: claims.toml")[2]


def test_less_is_better_where_the_row_says_so(sources):
    slow = Row(
        subject="bent", setting="", metric="loss", value=1, unit="", better="lower", peer="x", peer_value=4, ratio=0.25
    )
    sources = with_row(sources, slow)
    (sources.root / "claims.toml").write_text(
        CLAIMS.replace('file = "cutting-cpu-2"', 'file = "cutting-cpu-2", metric = "loss"')
    )
    assert "4.00× to 25.00×" in block(sources, "ratios: claims.toml")[2]


@pytest.mark.parametrize(("right", "wrong"), [('setting = "wood"', 'setting = "wod"'), ("cutting-h100", "cutting-h10")])
def test_a_claim_that_means_no_row_is_named(sources, right, wrong):
    (sources.root / "claims.toml").write_text(CLAIMS.replace(right, wrong))
    with pytest.raises(UsageError, match=r"0 rows of 'cutting-h100?' are meant by 'fast', and one should be"):
        render(sources, "<!-- ratios: claims.toml -->\n<!-- end -->\n")


def test_a_claim_that_means_two_rows_is_named(sources):
    sources = with_row(sources, sources.results[0].rows[0])
    (sources.root / "claims.toml").write_text(CLAIMS)
    with pytest.raises(UsageError, match="2 rows of 'cutting-cpu-2' are meant by 'slow', and one should be"):
        render(sources, "<!-- ratios: claims.toml -->\n<!-- end -->\n")


def test_bars_start_at_one_and_end_at_the_ratio(sources):
    """On a scale on which twice is as far to the right as half is to the left."""
    behind = Row(
        subject="bent", setting="stone", metric="speed", value=1, unit="m/s", peer="x", peer_value=2, ratio=0.5
    )
    (sources.root / "docs").mkdir()
    sources = with_row(sources, behind)
    text = CLAIMS.replace('file = "cutting-cpu-2"', 'file = "cutting-cpu-2", setting = "stone"').replace(
        "h100", "cpu-2"
    )
    (sources.root / "docs" / "made.toml").write_text(text)
    assert "](images/bars/made.svg)" in block(sources, "bars: docs/made.toml")[0]
    ((path, drawn),) = generate.pictures(sources, ["![Bars](docs/images/bars/made.svg)"])
    assert path == sources.root / "docs" / "images" / "bars" / "made.svg"
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.fromstring(drawn)
    slow, fast = picture.findall(f"{svg}rect")[1:]
    one = next(float(line.get("x1")) for line in picture.findall(f"{svg}line") if line.get("stroke") == "#888")
    start, end = (float(slow.get("x")), float(slow.get("x")) + float(slow.get("width")))
    assert end == pytest.approx(one, abs=0.1)
    assert float(fast.get("x")) == pytest.approx(one, abs=0.1)
    assert float(fast.get("width")) == pytest.approx((end - start) * math.log2(2.5), abs=0.2)
    assert slow.get("fill") != fast.get("fill")
    assert {"Cutting & sawing", "slow", "0.50×", "2.50×"} <= {text.text for text in picture.findall(f"{svg}text")}


SOURCES = {
    "__init__.py": '"""The whole, which is no row."""\nimport penstock.cli',
    "core/__init__.py": '"""Small & plain.\n\nMore of it."""',
    "core/files.py": "",
    "ops/__init__.py": '"""Operators."""',
    "ops/paged/__init__.py": '"""Blocks of ``ops``."""\nfrom penstock.core.files import read',
    "ops/paged/deep/__init__.py": '"""Deeper."""',
    "policy.py": '"""The registry."""',
    "cli/__init__.py": '"""Verbs."""\ndef late():\n    from penstock.ops import paged',
    "__main__.py": '"""Starts."""\nfrom penstock.cli import main',
}


@pytest.fixture
def packages(sources):
    """The same, with four rows of a house: ``cli`` imports ``ops``, and a room of that imports ``core``."""
    for name, text in SOURCES.items():
        path = sources.root / "src" / "penstock" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sources


def test_rooms_are_listed_in_the_order_of_the_house(packages):
    assert block(packages, "rooms") == [
        "- [`core`](../src/penstock/core): Small & plain.",
        "- [`policy`](../src/penstock/policy.py): The registry.",
        "- [`ops`](../src/penstock/ops): Operators.",
        "  - [`paged`](../src/penstock/ops/paged): Blocks of `ops`.",
        "  - [`paged.deep`](../src/penstock/ops/paged/deep): Deeper.",
        "- [`cli`](../src/penstock/cli): Verbs.",
    ]
    assert "](src/penstock/core)" in block(packages, "rooms", "README.md")[0]


def test_the_house_is_drawn_with_its_rooms_and_imports(packages):
    shown = block(packages, "house")
    assert shown[0].endswith("](images/rooms.svg)")
    ((path, drawn),) = generate.pictures(packages, shown)
    assert path == packages.root / "docs" / "images" / "rooms.svg"
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.fromstring(drawn)
    boxes = [rect for rect in picture.findall(f"{svg}rect") if rect.get("rx") == "6"]
    ends = [(float(box.get("y")), float(box.get("y")) + float(box.get("height"))) for box in boxes]
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(ends))

    def inside(text):
        return next(place for place, (begin, end) in enumerate(ends) if begin < float(text.get("y")) < end)

    texts = picture.findall(f"{svg}text")
    assert [inside(text) for text in texts if text.text in ("core", "policy", "ops", "cli")] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [inside(text) for text in texts if text.text in ("paged", "Small & plain")] == [0, 2]
    assert [text.text for text in texts if text.get("font-family")] == ["paged"]
    marks = picture.findall(f"{svg}circle")
    columns = {text.text: float(text.get("x")) for text in texts if float(text.get("x")) > generate.BOX}
    assert {mark.find(f"{svg}title").text for mark in marks} == {"ops imports core", "cli imports ops"}
    for mark in marks:
        user, used = mark.find(f"{svg}title").text.split(" imports ")
        begin, end = ends[["core", "policy", "ops", "cli"].index(user)]
        assert begin < float(mark.get("cy")) < end
        assert abs(float(mark.get("cx")) - columns[used]) < generate.CELL / 2


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "<!-- figures: cuting -->\n<!-- end -->\n",
            "bench/results has no figures called 'cuting': did you mean 'cutting",
        ),
        ("<!-- policies: test.cat -->\n<!-- end -->\n", "there is no contract 'test.cat': did you mean 'test.cut'"),
        ("<!-- papers: plannd -->\n<!-- end -->\n", "there is no list of papers 'plannd': did you mean 'planned'"),
        ("<!-- figrues: x -->\n<!-- end -->\n", "there is no generator 'figrues': did you mean 'figures'"),
        ("<!-- timelines: a,b -->\n<!-- end -->\n", "there is no schedule '"),
        ("<!-- contracts -->\n", "the marker '<!-- contracts -->' has no partner"),
        ("<!-- end -->\n", "the marker '<!-- end -->' has no partner"),
        (
            "<!-- contracts -->\nprose\n<!-- papers: planned -->\n<!-- end -->\n",
            "the marker '<!-- contracts -->' has no end of its own",
        ),
    ],
)
def test_a_fault_in_a_marker_is_named_with_its_document(sources, text, fault):
    with pytest.raises(UsageError) as caught:
        render(sources, text)
    assert str(caught.value).startswith(f"docs/page.md: {fault}")


@pytest.mark.parametrize("text", ["", "no markers", "`<!-- contracts -->` in a line\n", "    <!-- contracts -->\n"])
def test_what_is_no_marker_is_left_alone(sources, text):
    assert render(sources, text) == text


def test_timelines_are_drawn_where_a_document_shows_them(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no picture\n")
    assert generate.main([], tmp_path) == 0
    assert not (tmp_path / "docs" / "images").exists()
    (tmp_path / "docs" / "a.md").write_text("Here:\n\n<!-- timelines -->\n<!-- end -->\n")
    assert generate.main([], tmp_path) == 0
    shown = re.findall(r"\]\((images/pipeline/\w+\.svg)\)", (tmp_path / "docs" / "a.md").read_text())
    assert len(shown) == len(generate.index().names("pipeline.schedule"))
    for target in shown:
        picture = ElementTree.fromstring((tmp_path / "docs" / target).read_text())
        tasks = picture.findall(".//{http://www.w3.org/2000/svg}title")
        assert len(tasks) >= 4 * 8 * 2, target
    (tmp_path / "docs" / shown[0]).write_text("stale")
    assert generate.main(["--check"], tmp_path) == 1
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0


def test_some_timelines_share_a_scale(tmp_path):
    """In the README: the longer schedule fills the width, the other one stops at its own time."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Here:\n\n<!-- timelines: 1f1b,zb_auto -->\n<!-- end -->\n")
    assert generate.main([], tmp_path) == 0
    assert "](docs/images/pipeline/1f1b-zb_auto.svg)" in (tmp_path / "README.md").read_text()
    (path,) = (tmp_path / "docs" / "images" / "pipeline").iterdir()
    assert path.name == "1f1b-zb_auto.svg"
    picture = ElementTree.fromstring(path.read_text())
    svg = "{http://www.w3.org/2000/svg}"
    ends = {False: 0.0, True: 0.0}
    for block in picture.findall(f"{svg}rect[{svg}title]"):
        below = float(block.get("y")) > float(picture.get("height")) / 2
        ends[below] = max(ends[below], float(block.get("x")) + float(block.get("width")))
    assert [ends[False] - 28, ends[True] - 28] == pytest.approx([932, 932 * 27 / 33], abs=0.2)
    titles = [text.text for text in picture.findall(f"{svg}text") if text.text.startswith(("1f1b", "zb_auto"))]
    assert titles == [
        "1f1b: time 33, bubble 27%, 4 activations at most",
        "zb_auto: time 27, bubble 11%, 4 activations at most",
    ]
    assert generate.main(["--check"], tmp_path) == 0


def test_checking_names_what_is_stale_and_changes_nothing(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    stale = "<!-- figures: made -->\nold\n<!-- end -->\n"
    for name in ("README.md", "docs/a.md"):
        (tmp_path / name).write_text(stale)
    (tmp_path / "docs" / "plain.md").write_text("nothing generated\n")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    row = {"subject": "s", "setting": "", "metric": "m", "unit": "", "value": 7}
    (tmp_path / "bench" / "results" / "made-d.json").write_text(
        json.dumps(
            {"name": "made", "device": "d", "hardware": "h", "date": "2026-01-31", "versions": {}, "commit": "c",
             "rows": [row]}
        )
    )  # fmt: skip
    assert generate.main(["--check"], tmp_path) == 1
    *named, advice = capsys.readouterr().out.splitlines()
    assert named == ["README.md is stale", "docs/a.md is stale"]
    assert "Run 'make docs', and commit what it writes." in advice
    assert (tmp_path / "README.md").read_text() == stale
    assert generate.main([], tmp_path) == 0
    assert "| s |  | m ↑ | 7.000 | 1 |" in Path(tmp_path / "docs" / "a.md").read_text()
    capsys.readouterr()
    assert generate.main(["--check"], tmp_path) == 0
    assert capsys.readouterr().out == ""


def test_policies_stand_beside_the_claims_of_their_papers(sources):
    """A subject that is no policy has no claim; what one subject alone has is no column."""
    rows = [
        Row(subject=subject, setting="wood", metric=metric, value=value, unit="m")
        for subject, metric, value in (("slanted", "depth", 3), ("by hand", "depth", 4), ("slanted", "waste", 5))
    ]
    sources = dataclasses.replace(sources, results=[sources.results[0].model_copy(update={"rows": tuple(rows)})])
    text = "\n".join(block(sources, "claims: cutting,test.cut"))
    assert "| Policy | depth, wood | Claim of its paper |" in text
    assert "| slanted | 3.000 m | 10x; 20x |" in text and "| by hand | 4.000 m |  |" in text and "waste" not in text


def test_points_stand_where_their_metrics_say(sources):
    """The one across on a scale of powers, the other up from zero."""
    rows = [
        Row(subject=subject, setting="wood", metric=metric, value=value, unit="m")
        for subject, metric, value in (
            *(("a", "so much", 4), ("b", "so much", 8), ("c", "so much", 16)),
            *(("a", "depth", 0), ("b", "depth", 10), ("c", "depth", 20)),
        )
    ]
    sources = dataclasses.replace(sources, results=[sources.results[0].model_copy(update={"rows": tuple(rows)})])
    shown = block(sources, "points: cutting-cpu-2,so-much,depth")[0]
    assert "![depth against so much](images/points/cutting-cpu-2,so-much,depth.svg)" in shown
    ((_, drawn),) = generate.pictures(sources, [shown])
    svg = "{http://www.w3.org/2000/svg}"
    dots = ElementTree.fromstring(drawn).findall(f"{svg}circle")[1:]  # behind the legend's
    found = sorted((float(dot.get("cx")), float(dot.get("cy"))) for dot in dots)
    assert found[1][0] - found[0][0] == pytest.approx(found[2][0] - found[1][0], abs=0.2)
    assert found[0][1] - found[1][1] == pytest.approx(found[1][1] - found[2][1], abs=0.2) and found[0][1] > found[1][1]


def test_shares_stand_where_their_settings_say(sources):
    """The share across, evenly; what is added to the peer's figure on a scale of powers; and no point for a setting
    without a share, for another peer, and where nothing is added."""

    def row(subject: str, setting: str, value: float, peer: str = "whole", peer_value: float = 1.0) -> Row:
        beside = {"peer": peer, "peer_value": peer_value, "ratio": value / peer_value}
        return Row(subject=subject, setting=setting, metric="waste", value=value, unit="m", better="lower", **beside)

    rows = [row("a", "wood, 20% kept", 5.0), row("a", "wood, 40% kept", 3.0), row("a", "wood, 60% kept", 2.0)]
    rows += [row("b", "wood", 9.0), row("c", "wood, 50% kept", 9.0, "a", 2.0), row("d", "wood, 50% kept", 1.0)]
    rows += [row("e", "wood, 40% on the device, thin", 3.0)]
    sources = dataclasses.replace(sources, results=[sources.results[0].model_copy(update={"rows": tuple(rows)})])
    shown = block(sources, "shares: cutting-cpu-2,waste")[0]
    ((_, drawn),) = generate.pictures(sources, [shown])
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(drawn)
    dots = sorted((float(dot.get("cx")), float(dot.get("cy"))) for dot in root.findall(f"{svg}circle"))
    one, two, same, last = dots
    assert two == same
    assert two[0] - one[0] == pytest.approx(last[0] - two[0], abs=0.2)
    assert two[1] - one[1] == pytest.approx(last[1] - two[1], abs=0.2) and one[1] < two[1] < last[1]
    assert {"a", "e, thin"} <= {text.text for text in root.findall(f"{svg}text")}
    with pytest.raises(UsageError, match="in settings that name a share"):
        generate.drawn_shares(sources, "cutting-cpu-2", "depth")


def test_a_picture_has_a_panel_for_each_metric_that_was_measured(sources):
    """The same heights in both, and the second as far below the first for every point."""
    rows = [
        Row(subject=subject, setting="wood", metric=metric, value=value, unit="m")
        for subject, numbers in (("a", (4, 0.5, 5)), ("b", (16, 0.25, 20)))
        for metric, value in zip(("so much", "so long", "depth"), numbers, strict=True)
    ]
    sources = dataclasses.replace(sources, results=[sources.results[0].model_copy(update={"rows": tuple(rows)})])
    shown = block(sources, "points: cutting-cpu-2,so-much,so-long,never,depth")[0]
    assert "![depth against so much and so long and never]" in shown
    ((_, drawn),) = generate.pictures(sources, [shown])
    svg = "{http://www.w3.org/2000/svg}"
    dots = [
        (float(dot.get("cx")), float(dot.get("cy"))) for dot in ElementTree.fromstring(drawn).findall(f"{svg}circle")
    ]
    first, second = sorted(dots[1:3]), sorted(dots[4:6])  # behind the legend's
    assert [x for x, _ in first] == [x for x, _ in second], "both ends of their scales"
    (a, b), (other_b, other_a) = ([y for _, y in panel] for panel in (first, second))
    assert a > b and other_a - a == pytest.approx(other_b - b, abs=0.2) and other_b - b > a
    with pytest.raises(UsageError, match="has none of the metrics never"):
        generate.drawn_points(sources, "cutting-cpu-2", "never", "depth")
