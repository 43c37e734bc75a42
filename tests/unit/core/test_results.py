"""Results of benchmarks as files: what is accepted, and how figures are shown."""

from __future__ import annotations

import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError, PenstockError
from penstock.core.results import HEADINGS, Result, Row, cells, format_number, read_results, results_folder
from penstock.papers.catalogue import bibliography

ROW = {"subject": "ours", "setting": "fp32", "metric": "throughput", "value": 1234.5, "unit": "tokens/s"}
PEER = {"peer": "theirs", "peer_value": 1000.0, "ratio": 1.2345}
RESULT = {
    "name": "train",
    "device": "cpu-2",
    "hardware": "a processor, 2 threads",
    "date": "2026-01-31",
    "versions": {"python": "3.11.7"},
    "commit": "abc1234",
    "rows": [ROW, {**ROW, **PEER, "papers": [7]}],
}


def write(folder, file="train-cpu-2.json", **changes):
    (folder / file).write_text(json.dumps({**RESULT, **changes}))
    return folder


def test_what_is_read_is_what_was_written(tmp_path):
    (result,) = read_results(write(tmp_path))
    assert result.date == datetime.date(2026, 1, 31)
    assert Result.model_validate_json(result.model_dump_json()) == result
    assert result.rows[1].ratio == 1.2345


def test_a_row_is_evidence_for_the_papers_that_it_names(tmp_path):
    (result,) = read_results(write(tmp_path))
    assert result.rows_on(7) == [result.rows[1]]
    assert result.rows_on(3) == []


@pytest.mark.parametrize(
    ("ratios", "better", "claim", "verdict"),
    [
        ((1.2, 1.1, 1.3), "higher", "gain", "confirmed"),
        ((1.2, 1.1, 1.3), "lower", "gain", "contradicted"),
        ((0.8, 0.7, 0.9), "lower", "gain", "confirmed"),
        ((1.1, 0.9, 1.3), "higher", "gain", "undecided"),
        ((0.9, 0.8, 1.2), "lower", "gain", "undecided"),
        ((1.0, None, None), "higher", "gain", "contradicted"),
        ((1.0, None, None), "higher", "parity", "confirmed"),
        ((0.96, 0.955, 1.0), "higher", "parity", "confirmed"),
        ((0.92, None, None), "higher", "parity", "contradicted"),
        ((1.04, None, None), "lower", "parity", "confirmed"),
        ((1.1, None, None), "lower", "parity", "contradicted"),
        ((0.5, None, None), "lower", "parity", "confirmed"),
    ],
)
def test_whether_a_ratio_lies_where_the_claim_says(ratios, better, claim, verdict):
    names = dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True))
    row = Row(**{**ROW, **PEER, **names, "better": better, "claim": claim})
    assert row.verdict == verdict


@pytest.mark.parametrize(("ratios", "verdict"), [((0.25, 0.24, 0.3), "confirmed"), ((0.6, 0.5, 0.7), "contradicted")])
def test_a_gain_may_be_held_to_its_size(ratios, verdict):
    names = dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True))
    assert Row(**{**ROW, **PEER, **names, "better": "lower", "least": 3}).verdict == verdict


def test_a_figure_without_a_peer_has_no_verdict():
    assert Row(**ROW).verdict is None


def test_results_come_in_order_and_quick_ones_are_left_out(tmp_path):
    write(tmp_path, "b.json", name="b")
    write(tmp_path, "a.json", name="a")
    write(tmp_path, "c.json", name="c", quick=True)
    (tmp_path / "notes.txt").write_text("not a result")
    assert [result.name for result in read_results(tmp_path)] == ["a", "b"]
    assert read_results(tmp_path / "missing") == read_results(None) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"devise": "x"}, "devise: unknown key; did you mean 'device'"),
        ({"date": "yesterday"}, "date: Input should be a valid date"),
        ({"rows": [{**ROW, "value": None}]}, "rows.0.value: Input should be a valid number"),
        ({"rows": [{**ROW, "value": float("inf")}]}, "rows.0.value: Input should be a finite number"),
        ({"rows": [{**ROW, "ratio": 2.0}]}, "rows.0: peer, peer_value and ratio go together"),
        ({"rows": [{**ROW, "papers": [4]}]}, "rows.0: a row that is evidence for a paper stands beside the paper's"),
        ({"papers": [4]}, "papers: unknown key"),
    ],
)
def test_a_wrong_result_is_named_with_its_fault(tmp_path, changes, fault):
    with pytest.raises(ConfigError) as caught:
        read_results(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'train-cpu-2.json'}: not valid")
    assert fault in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"name": ')
    with pytest.raises(PenstockError, match=r"half\.json is not valid JSON"):
        read_results(tmp_path)


def test_the_results_of_this_repository_are_valid_and_cite_known_papers():
    for result in read_results(results_folder()):
        assert (results_folder() / f"{result.name}-{result.device}.json").is_file()
        for row in result.rows:
            for paper in row.papers:
                bibliography().paper(paper)


def test_the_evidence_of_this_repository_compares_what_runs_on_one_engine():
    """Policies of ours beside policies of ours, or the same work in another order: no row sets ours beside another
    system's and calls that a paper's gain."""
    others = ("torch", "transformers", "vllm", "scaled_dot_product", "flashinfer", "xz")
    rows = [row for result in read_results(results_folder()) for row in result.rows if row.papers]
    assert rows
    for row in rows:
        assert not any(other in f"{row.subject} {row.peer}".casefold() for other in others), row


@given(st.floats(-1e12, 1e12, allow_subnormal=False))
def test_numbers_are_shown_to_four_digits(value):
    shown = float(format_number(value).replace(",", ""))
    # Half a unit in the fourth digit is at most 1 in 2,000; from 1,000 on, it is half a unit before the point.
    assert abs(shown - value) <= (0.5 if abs(value) >= 1000 else abs(value) / 2000)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.94, "1.940"), (12.339, "12.34"), (17676.4, "17,676"), (-0.5, "-0.5000"), (1.5e-7, "1.5e-07")],
)
def test_how_numbers_look(value, text):
    assert format_number(value) == text


def test_cells_of_a_full_row():
    row = Row(
        **ROW, **PEER, low=1200, high=1300, peer_low=900, peer_high=1100, ratio_low=1.1, ratio_high=1.4, repetitions=5
    )
    assert dict(zip(HEADINGS, cells(row), strict=True)) == {
        "Subject": "ours",
        "Setting": "fp32",
        "Metric": "throughput ↑",
        "Median (range)": "1,234 tokens/s (1,200–1,300)",
        "n": "5",
        "Peer": "theirs",
        "Peer's median (range)": "1,000 tokens/s (900.0–1,100)",
        "Ratio (range)": "1.234× (1.100–1.400)",
    }


def test_cells_of_a_bare_row():
    assert cells(Row(**{**ROW, "unit": "", "better": "lower"})) == (
        "ours", "fp32", "throughput ↓", "1,234", "1", "", "", "",
    )  # fmt: skip
