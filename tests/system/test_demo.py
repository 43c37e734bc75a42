"""``penstock demo`` as a person runs it, only shorter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.core.metrics import read_metrics
from penstock.data.store import TokenStore
from penstock.models import hub
from programs import ENVIRONMENT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def demo(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "penstock", "demo", "--out", "demo", *arguments]
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "OMP_NUM_THREADS"} | environment
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    )


def test_from_nothing_to_a_model(tmp_path):
    process = demo(tmp_path, "--minutes", "0.2")
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    run = tmp_path / "demo"
    summary = json.loads((run / "summary.json").read_text())
    wanted = {
        "documents",
        "bits_per_byte",
        "xz_bits_per_byte",
        "tokens_per_s",
        "parameters",
        "steps",
        "tokens",
        "seconds",
    }
    assert set(summary) == wanted
    assert summary["parameters"] == hub.load(run).parameter_count()
    assert summary["steps"] == len(read_metrics(run / "metrics.jsonl"))
    assert summary["seconds"] >= 3  # the share of the twelve seconds that training gets at least
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert 1.5 < summary["bits_per_byte"] < 8
    assert 1.5 < summary["xz_bits_per_byte"] < 3
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    held_out = TokenStore.open(run / "store").split("held_out")
    names = {held_out.name(number) for number in range(held_out.documents)}
    assert 1 <= len(names.intersection(out.splitlines())) <= 3
    assert f"{summary['xz_bits_per_byte']:.3f}" in out
    assert "penstock generate demo --prompt" in out
    assert "Traceback" not in errors


def test_without_a_compiler_and_interrupted(tmp_path):
    """It says that it does not compile, stops when asked, and goes on as any other run."""
    process = demo(tmp_path, "--minutes", "5", PATH="/nowhere", CXX="")
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "demo" / "metrics.jsonl"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "compile false: there is no C++ compiler" in out
    assert "continue with: penstock train --resume demo\n" in out
    command = [sys.executable, "-m", "penstock", "train", "--resume", "demo", "--set", "minutes=0.001"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per byte on held-out documents" in done.stdout
