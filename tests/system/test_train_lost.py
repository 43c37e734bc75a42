"""A process of a pipeline is lost: one error, which names it, whichever it is and however it went."""

from __future__ import annotations

from pathlib import Path

import pytest

from lost_ranks import check_one_error, configured

SIZE = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return configured(tmp_path_factory.mktemp("data"), SIZE, timeout=3)


@pytest.mark.parametrize(
    ("lost", "how", "where"),
    [
        (0, "kill", "pipeline"),
        pytest.param(2, "kill", "agreement", marks=pytest.mark.slow),
        pytest.param(1, "raise", "update", marks=pytest.mark.slow),
        (2, "stop", "pipeline"),
        pytest.param(1, "kill", "update", marks=pytest.mark.slow),
        pytest.param(0, "raise", "agreement", marks=pytest.mark.slow),
        pytest.param(2, "raise", "pipeline", marks=pytest.mark.slow),
        pytest.param(1, "defect", "update", marks=pytest.mark.slow),
        pytest.param(0, "stop", "update", marks=pytest.mark.slow),
    ],
)
def test_one_error_names_the_process_that_was_lost(config, tmp_path, lost, how, where):
    check_one_error(config, tmp_path / "run", SIZE, lost, how, where, patience=120)
