"""``penstock pipeline``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.errors import PenstockError, UsageError
from penstock.pipeline.ir.torch_csv import from_csv
from penstock.policy import create, index


def pipeline(*arguments: str) -> str:
    done = CliRunner().invoke(build_app(), ["pipeline", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_show_draws_every_device():
    shown = pipeline("show", "zb-h1", "--stages", "3", "--microbatches", "4")
    assert "zb-h1: 3 devices, 4 microbatches" in shown
    assert "0  F0   F1   F2   ··········I0   W0   F3 " in shown
    assert "makespan 14   longest span of a device 14   bubble 14.3%" in shown


def test_json_has_the_figures_of_the_costs():
    arguments = ("--stages", "2", "--microbatches", "2", "--cost", "F=1,I=2,W=3,comm=0.5", "--json")
    found = json.loads(pipeline("show", "1f1b", *arguments))
    assert found["makespan"] == 19
    assert found["bubble_time"] == 7
    assert found["peak_activations"] == [2, 1]
    assert found["transfers"] == 4
    assert found["name"] == "1f1b"


def test_chunks_and_options_reach_the_schedule():
    found = json.loads(pipeline("show", "interleaved_1f1b", "--chunks", "4", "--json"))
    assert (found["stages"], found["bubble_time"]) == (16, 9 / 4)
    assert json.loads(pipeline("show", "hanayo", "--set", "waves=3", "--json"))["stages"] == 24


def test_files_are_written(tmp_path):
    files = {kind: tmp_path / f"x.{kind}" for kind in ("html", "png", "trace")}
    pipeline("show", "v_zb", *(part for kind, path in files.items() for part in (f"--{kind}", path)))
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(files["trace"].read_text())["traceEvents"]) > 4 * 8 * 6


def test_a_sharded_vocabulary_balances_the_last_device():
    arguments = ("--cost", "F=1,I=1,W=1,output=2", "--json")
    plain, *sharded = (
        json.loads(pipeline("show", "1f1b", *arguments, *transform))
        for transform in ((), *(("--transform", f"vocabulary:barriers={barriers}") for barriers in (1, 2, 3)))
    )
    assert plain["makespan"] > 8 * (3 + 3 * 2)
    for barriers, found in enumerate(sharded, 1):
        assert found["makespan"] <= 8 * (3 + 3 * 2 / 4) + 3 * 3 + barriers
        assert found["peak_activations"][0] <= 4 + barriers


def test_compare_has_every_schedule_or_its_reason():
    rows = json.loads(pipeline("compare", "--stages", "3", "--microbatches", "5", "--json"))
    assert sorted(row["name"] for row in rows) == index().names("pipeline.schedule")
    refused = {row["name"]: row["refused"] for row in rows if "refused" in row}
    assert refused.keys() == {"bitpipe", "chimera", "dualpipe", "dualpipev"}
    assert "3 devices and 6 microbatches" in refused["dualpipev"]
    makespans = [row["makespan"] for row in rows if "makespan" in row]
    assert makespans == sorted(makespans)
    table = pipeline("compare", "--stages", "4", "--microbatches", "8")
    for name in index().names("pipeline.schedule"):
        assert name in table


def test_a_costs_file_reaches_the_simulator_and_the_search(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"forward": [1, 2], "input_grad": [2, 3], "weight_grad": [1, 1], "transfer": 0.5}))
    arguments = ("--stages", "2", "--microbatches", "2", "--costs", path, "--json")
    # Device 1 begins at 1.5 and needs 10 for F and I of both; device 0 hears of the last at 12, and has I and W to do.
    found = json.loads(pipeline("show", "zb_auto", *arguments))
    assert found["makespan"] == 15
    assert json.loads(pipeline("show", "1f1b", *arguments))["makespan"] > found["makespan"]
    path.write_text(json.dumps({"forward": [1, 2, 3]}))
    with pytest.raises(UsageError, match="forward are for 3 stages, and this pipeline has 2"):
        pipeline("show", "zb_auto", *arguments)
    path.write_text(json.dumps({"forwards": 1}))
    with pytest.raises(PenstockError, match="forwards: unknown key"):
        pipeline("show", "gpipe", *arguments)


def test_transforms_apply_in_turn():
    arguments = ("--stages", "4", "--microbatches", "8", "--json")
    plain, split, away = (
        json.loads(pipeline("show", "1f1b", *transforms, *arguments))
        for transforms in ((), ("--transform", "2bp"), ("--transform", "2bp", "--transform", "pipeoffload:share=0.5"))
    )
    assert plain["makespan"] == 33 > split["makespan"] == away["makespan"] == 27
    offloaded = json.loads(pipeline("show", "1f1b", "--transform", "pipeoffload", *arguments))
    assert max(offloaded["peak_bytes"]) < max(plain["peak_bytes"])
    rows = json.loads(pipeline("compare", "--transform", "2bp", *arguments))
    assert next(row for row in rows if row["name"] == "1f1b")["makespan"] == 27
    assert "1f1b + 2bp: 4 devices" in pipeline("show", "1f1b", "--transform", "2bp")
    assert "0I0" in pipeline("export", "1f1b", "--transform", "2bp", "--csv", "-")


def test_search_finds_the_fastest_within_the_memory():
    """At a slow host: of what compare lists, nothing that fits is faster, and zb_auto plans for the limit."""
    arguments = ("--stages", "4", "--microbatches", "4", "--cost", "F=1,I=1,W=1,host=100", "--json")
    compared = [row for row in json.loads(pipeline("compare", *arguments)) if "makespan" in row]
    for memory in (1.5, 8):
        rows = json.loads(pipeline("search", "--memory", memory, "--top", 1000, *arguments))
        assert all(max(row["peak_bytes"]) <= memory for row in rows)
        assert [row["makespan"] for row in rows] == sorted(row["makespan"] for row in rows)
        names = [row["name"] for row in rows]
        assert len(names) == len(set(names))
        assert "pipedream" not in names and "zb_auto" in names
        assert all(row["makespan"] >= rows[0]["makespan"] for row in compared if max(row["peak_bytes"]) <= memory)
    assert "hanayo waves=4" in names


def test_search_says_how_much_memory_would_do():
    with pytest.raises(UsageError, match=r"holds within 0.01\n.* holds least: 0"):
        pipeline("search", "--memory", 0.01, "--stages", "4", "--microbatches", "4")


def test_routes_are_shown_too():
    shown = pipeline("show", "skippipe", "--stages", "4", "--microbatches", "4", "--set", "skip=0.25")
    assert "skippipe: 4 devices, 4 microbatches" in shown
    assert json.loads(pipeline("show", "checkfree", "--json"))["transfers"] == 48


def test_export_and_import_make_a_round_trip(tmp_path):
    path = tmp_path / "schedule.csv"
    arguments = ("--stages", "4", "--microbatches", "8")
    assert pipeline("export", "v_half", *arguments, "--csv", path) == ""
    assert from_csv(path.read_text(), "it") == create("pipeline.schedule", "v_half").build(4, 8)
    assert pipeline("export", "v_half", *arguments, "--csv", "-") == path.read_text()
    assert pipeline("export", path, "--csv", "-") == path.read_text()
    direct, imported = (json.loads(pipeline("show", n, *arguments, "--json")) for n in ("v_half", path))
    assert direct | {"name": ""} == imported | {"name": ""}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("show", "zb_h3"), "did you mean 'zb_h"),
        (("show", "1f1b", "--chunks", "2"), "no option 'chunks'"),
        (("show", "interleaved_1f1b", "--chunks", "1"), "chunks"),
        (("show", "hanayo", "--set", "waves"), "section.key=value"),
        (("show", "hanayo", "--set", "name=gpipe"), "by its name"),
        (("show", "gpipe", "--stages", "0"), "0 devices does nothing"),
        (("show", "dualpipev", "--microbatches", "6"), "4 devices and 8 microbatches"),
        (("show", "gpipe", "--cost", "G=1"), "no cost 'G'"),
        (("show", "gpipe", "--cost", "F"), "F=1.5"),
        (("show", "gpipe", "--cost", "F=x"), "F=1.5"),
        (("show", "gpipe", "--cost", "F=-1"), "not negative"),
        (("show", "gpipe", "--cost", "W=nan"), "finite number"),
        (("show", "gpipe", "--cost", "comm=inf"), "transfer: Input should be a finite number"),
        (("show", "gpipe", "--transform", "2pb"), "did you mean '2bp'"),
        (("show", "gpipe", "--transform", "pipeoffload:share=2"), "less than or equal to 1"),
        (("show", "pipedream", "--transform", "2bp"), "stashes several"),
        (("export", "gpipe", "--transform", "pipeoffload", "--csv", "-"), "which activations are offloaded"),
        (("show", "checkfree", "--stages", "3"), "It works with 4 devices and 8 microbatches"),
        (("export", "skippipe", "--csv", "-"), "through all stages in order"),
        (("show", "nowhere.csv"), "cannot read nowhere.csv"),
        (("compare", "--microbatches", "0"), "0 microbatches does nothing"),
    ],
)
def test_bad_requests_are_usage_errors(arguments, complaint):
    with pytest.raises(UsageError, match=complaint):
        pipeline(*arguments)


def test_a_bad_csv_names_its_line(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0B0\n1F0\n")
    with pytest.raises(UsageError, match=r"bad.csv, line 2: 1B0 is missing"):
        pipeline("show", path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        pipeline("show", path)


def test_nothing_is_half_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PenstockError):
        pipeline("show", "gpipe", "--html", tmp_path / "file" / "x.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_says_what_pytorch_does_not_read(tmp_path):
    path = tmp_path / "chimera.csv"
    done = CliRunner().invoke(build_app(), ["pipeline", "export", "chimera", "--csv", str(path)])
    assert done.exit_code == 0
    assert "PyTorch does not read" in done.stderr
    assert from_csv(path.read_text(), "chimera.csv") == create("pipeline.schedule", "chimera").build(4, 8)
    assert "makespan 28 " in pipeline("show", str(path))
