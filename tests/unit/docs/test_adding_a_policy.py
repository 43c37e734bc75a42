"""The examples in the documents work as they stand there."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock import policy
from penstock.cli import build_app
from penstock.core import bench as bench_module
from penstock.core.results import repository
from programs import Program


def files_in(document: str) -> dict[str, str]:
    """The fenced blocks of a document that begin with the name of their file."""
    text = (repository() / "docs" / document).read_text(encoding="utf-8")
    return dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path):
    """The policy of the document and its test, and nothing else."""
    files = files_in("adding-a-policy.md")
    for name in ("penstock_staircase.py", "test_staircase.py"):
        (tmp_path / name).write_text(files[name])
    return tmp_path


@pytest.fixture
def distribution(folder):
    """The plug-in of the document, installed as pip would."""
    files = files_in("adding-a-policy.md")
    project = tomllib.loads(files["pyproject.toml"])
    assert [f"{module}.py" in files for module in project["tool"]["setuptools"]["py-modules"]] == [True]
    metadata = folder / "penstock_staircase-0.1.0.dist-info"
    metadata.mkdir()
    about = project["project"]
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    lines = [f"{name} = {value}" for name, value in about["entry-points"]["penstock.policies"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[penstock.policies]", *lines]))
    return folder


def check_the_working_directory() -> None:
    """What a process runs that is ``pytest``."""
    sys.path.insert(0, str(Path.cwd()))
    policy.index.cache_clear()
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "test_staircase.py"]))


def name_the_policy() -> None:
    """What a process does where the plug-in is installed: it has the policy by its name."""
    sys.path.insert(0, str(Path.cwd()))
    policy.index.cache_clear()
    print(policy.create("train.schedule", "staircase", stairs=4).describe())


def test_the_policy_of_the_document_passes_its_test_in_an_empty_folder(folder):
    done = Program(check_the_working_directory, folder=folder).completed()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_policy_of_the_document_works_as_a_plug_in(distribution):
    done = Program(name_the_policy, folder=distribution).completed()
    assert done.returncode == 0, done.stderr
    assert "'name': 'staircase', 'warmup': 0.0, 'warmup_steps': 0, 'stairs': 4" in done.stdout


def test_the_benchmark_of_the_document_runs(tmp_path, monkeypatch):
    ((name, text),) = files_in("benchmarks.md").items()
    (tmp_path / "bench").mkdir()
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(bench_module, "repository", lambda: tmp_path)
    arguments = ["bench", "sum", "--quick", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    done = CliRunner().invoke(build_app(), arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0
    assert "numpy" in done.stdout
    assert (tmp_path / "out.json").exists()
