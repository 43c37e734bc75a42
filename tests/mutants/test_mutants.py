"""Every law finds the bugs that it is there to catch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planting import HERE, mutants

from penstock.policy import index

CONTRACTS = sorted(index().contracts)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_mutants_can_be_planted(contract, tmp_path):
    """Four or more, of policies that there are, each with a text that occurs once, and another one that is Python where
    it is none for the C++ compiler, with no name that is not there: it would be found by its NameError."""
    listed = mutants(contract)
    assert len(listed) >= 4, f"plant more bugs in tests/mutants/{contract}.toml: it has {len(listed)} of at least four"
    assert len({mutant.bug for mutant in listed}) == len(listed)
    for number, mutant in enumerate(listed):
        assert mutant.policy in index().names(contract), f"there is no {contract} {mutant.policy!r}"
        assert mutant.new != mutant.old
        text = mutant.planted()
        if not mutant.native:
            compile(text, mutant.file, "exec")
            (tmp_path / f"{number}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", str(tmp_path)]
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_of_mutants_is_a_contracts():
    assert {path.stem for path in HERE.glob("*.toml")} == index().contracts.keys()


@pytest.mark.slow
@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_law_finds_every_mutant(contract):
    done = subprocess.run(
        [sys.executable, str(Path(HERE) / "planting.py"), contract],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["bug"] for result in results] == [mutant.bug for mutant in mutants(contract)]
    missed = [f"{result['bug']}: {result['missed']}" for result in results if "found" not in result]
    assert not missed, "\n".join(missed)
