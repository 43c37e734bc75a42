"""A folder with a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.models import hub
from small_folders import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hub.save(tiny(), tmp_path / "model-folder")
    return tmp_path / "model-folder"
